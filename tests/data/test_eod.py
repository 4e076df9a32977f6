"""What comes after each document of text: the tokenizer's end of text, another token, an id, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mambadsl.data.corpus import open_corpus
from mambadsl.data.rows import Rows
from mambadsl.text.tokenizer import ENDS, JsonFile

TEXTS = ["one two", "", "three", "two"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one two three")
    Path("b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def tokenizer(path: str, *special: str) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "three": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(list(special))
    made.save(path)
    return path


def documents(*paths: str, **how) -> list[list[int]]:
    corpus = open_corpus(paths, **{"vocab": 300, **how})
    return [corpus.tokens[a:b].tolist() for a, b in zip([0, *corpus.ends[:-1]], corpus.ends)]


PLAIN = [[0, 1, 2], [0, 1], [2], [1]]


def ended(id: int) -> list[list[int]]:
    return [[*document, id] for document in PLAIN]


def test_the_tokenizers_own(folder):
    both = "a.txt", "b.jsonl"
    assert documents(*both, tokenizer=tokenizer("t.json", "<pad>", "</s>")) == ended(5)
    assert documents(*both, tokenizer=tokenizer("u.json", "</s>", "<|endoftext|>")) == ended(5)
    assert documents(*both, tokenizer=tokenizer("v.json", "<pad>")) == PLAIN
    says = [open_corpus(both, vocab=300, tokenizer=name).says for name in ("t.json", "v.json")]
    assert says[0] == "documents end with `</s>`, the id 5"
    assert says[1] == "the tokenizer has no end of text that is known: nothing marks where documents end"


@pytest.mark.parametrize("name", ENDS)
def test_every_name_that_is_known(tmp_path, name):
    assert JsonFile(tokenizer(str(tmp_path / "t.json"), name), vocab=300).end_of_text() == name


def test_what_is_asked_for(folder):
    """Each in a cache of its own, whatever was encoded before."""
    made = tokenizer("t.json", "<pad>", "</s>")
    for eod, wanted in ("</s>", ended(5)), ("<pad>", ended(4)), ("two", ended(1)), (299, ended(299)), (None, PLAIN):
        assert documents("a.txt", "b.jsonl", tokenizer=made, eod=eod) == wanted
    assert documents("a.txt", tokenizer=made, eod=70_000, vocab=80_000) == [[0, 1, 2, 70_000]]


def test_bytes_have_none_but_an_id_past_them(folder):
    plain = [[*text.encode()] for text in ("one two three", *filter(None, TEXTS))]
    assert documents("a.txt", "b.jsonl") == documents("a.txt", "b.jsonl", eod=None) == plain
    assert documents("a.txt", "b.jsonl", eod=256) == [[*document, 256] for document in plain]


def test_files_of_tokens_are_as_they_are(folder):
    np.save("c.npy", np.array([1, 2, 0], np.uint16))
    assert documents("c.npy", tokenizer=tokenizer("t.json", "</s>"), eod=299) == [[1, 2, 0]]


def test_the_end_is_predicted_and_predicts_nothing(folder):
    rows = Rows(open_corpus("b.jsonl", vocab=300, tokenizer=tokenizer("t.json", "</s>")), length=7)
    batch = rows.training(0, 1)
    assert batch.tokens_BT.tolist() == [[0, 1, 4, 2, 4, 1, 4]]
    assert batch.targets_BT.tolist() == [[1, 4, -100, 4, -100, 4, -100]]
    assert batch.segments_BT.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


REFUSED = [
    (dict(tokenizer="t.json", eod="<pda>"), "the tokenizer has no token `<pda>`; did you mean `<pad>`?"),
    (dict(tokenizer="t.json", eod="|||"), "the tokenizer has no token `|||`; its special tokens are <pad>, </s>"),
    (dict(tokenizer="t.json", eod=300), "documents cannot end with the id 300: the model has ids from 0 to 299"),
    (dict(eod=10), "documents of bytes cannot end with `10`: past the bytes are the ids 256 to 299"),
    (dict(eod="</s>", vocab=256), "documents of bytes cannot end with `</s>`: 256 ids are the bytes alone"),
]


@pytest.mark.parametrize("how, words", REFUSED)
def test_refusals(folder, how, words):
    tokenizer("t.json", "<pad>", "</s>")
    with pytest.raises(ValueError) as error:
        documents("a.txt", **how)
    assert words in str(error.value)
