"""Bytes and tokenizer files; text that comes out in whole characters as ids come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambadsl.text.tokenizer import Bytes, tokenizer


@given(st.text(alphabet="a \n\0é→🎈", max_size=20))
def test_bytes_come_back_as_the_text(text):
    tokens = Bytes().encode(text)
    assert Bytes().decode(tokens) == text
    pieces = list(Bytes().pieces(tokens))
    assert "".join(pieces) == text and "" not in pieces


@given(st.lists(st.integers(0, 300)))
def test_any_ids_have_a_text(tokens):
    text = Bytes(vocab=301).decode(tokens)
    assert text == "".join(Bytes(vocab=301).pieces(iter(tokens)))
    if all(t < 256 for t in tokens):
        assert text == bytes(tokens).decode("utf-8", errors="replace")


def test_a_character_comes_when_its_last_byte_does():
    given = iter("é→".encode())
    pieces = Bytes().pieces(given)
    assert next(pieces) == "é" and list(given) == list("→".encode())
    assert list(Bytes().pieces("é".encode()[:1])) == ["\N{REPLACEMENT CHARACTER}"]
    assert Bytes().decode([*"é".encode()[:1], 300, 65]) == "\N{REPLACEMENT CHARACTER}" * 2 + "A"


def test_small_vocabularies_and_lost_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 256"):
        tokenizer(vocab=100)
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="no tokenizer file"):
        tokenizer(tmp_path / "none.json", vocab=1000)


def test_a_tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    made.train_from_iterator(["the thin thing there", "this is theirs"] * 4, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    reader = tokenizer(tmp_path / "tokenizer.json", vocab=300)
    text = "the thing → déjà vu 🎈"
    tokens = reader.encode(text)
    assert reader.decode(tokens) == text and len(tokens) < len(text.encode())
    assert "".join(reader.pieces(iter(tokens))) == text
    assert "".join(reader.pieces(tokens[:-1])) == reader.decode(tokens[:-1])
    with pytest.raises(ValueError, match="ids and the model 100"):
        tokenizer(tmp_path / "tokenizer.json", vocab=100)
