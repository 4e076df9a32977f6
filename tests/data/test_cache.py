"""What is encoded once: equal to encoding it directly, complete or not there, written by one for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import accumulate, cycle, takewhile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambadsl.data import encode, texts
from mambadsl.data.corpus import open_corpus
from mambadsl.text.tokenizer import JsonFile

TEXT = "The quick brown fox → jumps over\n\n the lazy dog,   déjà vu 🎈 in 123 days. It's theirs; \"there\"!\r\n\tthen "


def trained(path: Path, kind: str) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    trainer = dict(vocab_size=400, special_tokens=["?"])
    if kind == "bytes":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":  # As SentencePiece: a mark before the text's first word.
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    elif kind == "normalized":
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFKD(), tokenizers.normalizers.StripAccents(), tokenizers.normalizers.Lowercase()]
        )
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.train_from_iterator([TEXT] * 4, tokenizers.trainers.BpeTrainer(show_progress=False, **trainer))
    made.enable_truncation(max_length=8)
    made.enable_padding(length=16)
    made.save(str(path))
    return path


@pytest.fixture(scope="module", params=["bytes", "metaspace", "normalized"])
def tokenizer(request, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("tokenizer") / f"{request.param}.json", request.param)


@pytest.fixture
def bytes_tokenizer(tmp_path):
    return trained(tmp_path / "tokenizer.json", "bytes")


WORDS = st.sampled_from(TEXT.split(" ") + ["\n", "a", "é" * 9, " " * 5, "th" * 90])


@settings(deadline=None, max_examples=40)
@given(st.lists(WORDS, min_size=80, max_size=200), st.lists(st.integers(1, 900), min_size=1, max_size=4), st.data())
def test_windows_give_the_whole_texts_ids(tokenizer, words, sizes, data):
    text = " ".join(words)
    reader = JsonFile(tokenizer, vocab=400)
    cuts = [0, *takewhile(lambda at: at < len(text), accumulate(cycle(sizes))), len(text)]
    pieces = [text[start:stop] for start, stop in zip(cuts, cuts[1:])]
    found = np.concatenate(list(encode.joined(pieces, reader.places, overlap=data.draw(st.integers(0, 400)))))
    assert found.tolist() == reader.encode(text)


def test_windows_that_never_agree_are_read_as_one():
    def places(texts: list[str]) -> list[list[tuple[int, int, int]]]:
        return [[(at, at + 1, len(text) + at) for at in range(len(text))] for text in texts]

    found = np.concatenate(list(encode.joined(["ab" * 30] * 5, places, overlap=50)))
    assert found.tolist() == list(range(300, 600))


def test_windows_are_cut_in_long_texts(bytes_tokenizer):
    """Memory does not grow with the text: what is put out comes in windows, not at the end."""
    reader = JsonFile(bytes_tokenizer, vocab=400)
    seen = 0

    def pieces():
        nonlocal seen
        for _ in range(64):
            seen += 1
            yield TEXT * 20

    first = next(encode.joined(pieces(), reader.places, overlap=512))
    assert seen <= 2 * encode._WINDOWS and len(first)


def test_caches_equal_direct_encoding(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "_BYTES", 5000)
    monkeypatch.setattr(encode, "_OVERLAP", 400)
    documents = [TEXT * 3, "", "the", "→"]
    (tmp_path / "a.txt").write_bytes((TEXT * 200).encode())
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    reader = JsonFile(tokenizer, vocab=400)
    expected = [ids for ids in map(reader.encode, [TEXT * 200, *documents]) if ids]
    for _ in range(2):
        corpus = open_corpus(
            [tmp_path / "a.txt", tmp_path / "b.jsonl"], vocab=400, tokenizer=tokenizer, cache=tmp_path / "cache"
        )
        found = [corpus.tokens[a:b].tolist() for a, b in zip([0, *corpus.ends[:-1]], corpus.ends)]
        assert found == expected


def test_a_cache_is_written_once_and_anew_for_what_changed(tmp_path, bytes_tokenizer, monkeypatch):
    written = []
    whole = encode.TokenizerEncoder.long_document
    monkeypatch.setattr(encode.TokenizerEncoder, "long_document", lambda *a: written.append(1) or whole(*a))
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    how = dict(vocab=400, tokenizer=bytes_tokenizer, cache=tmp_path / "cache")
    before = open_corpus(path, **how).tokens[:]
    assert (open_corpus(path, **how).tokens[:] == before).all() and len(written) == 1
    path.write_text(TEXT + "more")
    assert len(open_corpus(path, **how).tokens) > len(before) and len(written) == 2
    document = json.loads(bytes_tokenizer.read_text())
    document["model"]["merges"] = document["model"]["merges"][:9]
    bytes_tokenizer.write_text(json.dumps(document))
    assert len(open_corpus(path, **how).tokens) > len(before) and len(written) == 3
    with pytest.raises(ValueError, match="ids and the model 300"):
        open_corpus(path, **{**how, "vocab": 300})


def test_a_file_that_changes_meanwhile(tmp_path, bytes_tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    whole = encode.ByteEncoder.documents

    def documents(self, texts):
        yield from whole(self, texts)
        path.write_text('{"text": "other"}\n')

    monkeypatch.setattr(encode.ByteEncoder, "documents", documents)
    with pytest.raises(ValueError, match=r"a\.jsonl` was changed while it was read"):
        open_corpus(path, vocab=256, cache=tmp_path / "cache")
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".lock"}


def test_large_files_are_looked_through_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mambadsl.data.cache._REMEMBERED", 4)
    (tmp_path / "a.txt").write_text("long enough")
    np.save(tmp_path / "b.npy", np.arange(9))
    how = dict(vocab=256, cache=tmp_path / "cache")
    paths = [tmp_path / "a.txt", tmp_path / "b.npy"]
    whole = open_corpus(paths, **how)
    monkeypatch.setattr(texts, "check", lambda path: 1 / 0)
    monkeypatch.setattr("mambadsl.data.ids._extremes", lambda piece: 1 / 0)
    assert len(open_corpus(paths, **how).tokens) == len(whole.tokens)
    with pytest.raises(ValueError, match="id 8 at token 8"):
        open_corpus(paths[1], **{**how, "vocab": 8})


SLOW = """
import sys, time
from mambadsl.data import encode
from mambadsl.data.corpus import open_corpus

path, cache, seconds = sys.argv[1:]
whole = encode.ByteEncoder.documents

def documents(self, texts):
    print("writing", flush=True)
    for ids in whole(self, texts):
        yield ids
        time.sleep(float(seconds))

encode.ByteEncoder.documents = documents
print(open_corpus(path, vocab=256, cache=cache).tokens[:].tolist(), flush=True)
"""


def slow(path: Path, cache: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW, path, cache, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    writer = slow(path, cache, 60)
    assert writer.stdout.readline() == "writing\n"
    deadline = time.monotonic() + 20
    while not list(cache.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert {p.suffix for p in cache.iterdir()} == {".part", ".lock"}
    assert bytes(open_corpus(path, vocab=256, cache=cache).tokens[:].tolist()) == b"onetwo"
    assert {p.suffix for p in cache.iterdir()} == {".bin", ".idx", ".lock"}


def test_one_writes_and_the_others_wait(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    told = [ranks.communicate()[0].splitlines() for ranks in [slow(path, cache, 0.1) for _ in range(3)]]
    assert sorted(map(len, told)) == [1, 1, 2]
    assert {lines[-1] for lines in told} == {str(list(b"onetwo"))}


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="cache` cannot be read or written: No space left on device"):
        open_corpus(tmp_path / "a.jsonl", vocab=256, cache=tmp_path / "cache")
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".lock"}
