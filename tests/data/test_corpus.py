"""Files and folders as a corpus: what is read, in which order, and what is refused where."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed_by_hand import by_hand

from mambadsl.data import tokens as tokens_module
from mambadsl.data.corpus import open_corpus
from mambadsl.data.tokens import Piece, Tokens


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(corpus) -> list[bytes]:
    starts = [0, *corpus.ends[:-1]]
    return [bytes(corpus.tokens[start:end].tolist()) for start, end in zip(starts, corpus.ends)]


def lines(path: Path, *objects) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def test_text_is_its_bytes(folder):
    Path("a.txt").write_bytes("déjà\r\nvu 🎈".encode())
    Path("b.md").write_text("two")
    corpus = open_corpus(["a.txt", "b.md", "a.txt"], vocab=256)
    assert documents(corpus) == ["déjà\r\nvu 🎈".encode(), b"two", "déjà\r\nvu 🎈".encode()]
    assert not (folder / ".cache").exists()


def test_json_lines_are_documents(folder):
    lines(Path("a.jsonl"), {"text": "één"}, {"text": "", "n": 1}, {"text": "two\n"})
    Path("b.jsonl").write_text('{"body": "x"}\n\n  \n{"body": "y"}')
    assert documents(open_corpus("a.jsonl", vocab=256)) == ["één".encode(), b"two\n"]
    assert documents(open_corpus("b.jsonl", vocab=256, field="body", cache=folder / "c")) == [b"x", b"y"]
    assert len(list((folder / "c").glob("*.idx"))) == 1


def test_a_folder_is_all_its_files_in_order(folder):
    for name in "b/x.txt", "b.txt", "a/2.txt", "a/10.txt", ".git/config", "a/.hidden":
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("data", name).write_text(name)
    lines(Path("data/c.jsonl"), {"text": "json"})
    np.save("data/d.npy", np.array([1, 2], np.uint16))
    expected = [b"a/10.txt", b"a/2.txt", b"b/x.txt", b"b.txt", b"json", b"\1\2"]
    assert documents(open_corpus("data", vocab=256)) == expected
    assert documents(open_corpus(["data/d.npy", "data/a"], vocab=256)) == [b"\1\2", *expected[:2]]


def test_pairs_are_read_once(folder):
    Path("data").mkdir()
    by_hand(Path("data/x"), 8, "H", [[1, 2], [3]], [0, 1, 2])
    for paths in ["data"], ["data/x.bin", "data/x.idx"], ["data/x"], ["data/x.idx"]:
        assert documents(open_corpus(paths, vocab=256)) == [b"\1\2", b"\3"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_slices_of_many_files(tmp_path_factory, counts, data):
    folder = tmp_path_factory.mktemp("pieces")
    kinds = ["|u1", "<u2", "<i4", ">i8", "<f4"]
    pieces, whole = [], []
    for number, count in enumerate(counts):
        ids, kind = list(range(len(whole), len(whole) + count)), kinds[number % len(kinds)]
        path = folder / str(number)
        path.write_bytes(b"head" + np.array(ids).astype(kind).tobytes())
        pieces.append(Piece.at(path, kind, count, offset=4))
        whole += ids
    tokens = pickle.loads(pickle.dumps(Tokens(pieces)))
    at = st.one_of(st.none(), st.integers(-len(whole) - 2, len(whole) + 2))
    part = slice(data.draw(at), data.draw(at))
    assert tokens[part].tolist() == whole[part] and tokens[part].dtype == np.int64
    assert len(tokens) == len(whole) and [tokens[n] for n in (0, -1)] == [whole[0], whole[-1]] == [whole[0], tokens[-1]]
    with pytest.raises(IndexError):
        tokens[len(whole)]


def test_a_file_that_was_replaced(folder):
    Path("a.txt").write_text("one")
    corpus = open_corpus("a.txt", vocab=256)
    assert documents(corpus) == [b"one"]
    Path("b.txt").write_text("two")
    os.utime("b.txt", ns=(0, 0))
    os.replace("b.txt", "a.txt")
    assert documents(open_corpus("a.txt", vocab=256)) == [b"two"]
    tokens_module._mapped.cache_clear()
    with pytest.raises(ValueError, match="`a.txt` was changed after it was opened"):
        corpus.tokens[:]


def test_a_file_that_is_gone(folder):
    Path("a.txt").write_text("one")
    corpus = open_corpus("a.txt", vocab=256)
    Path("a.txt").unlink()
    with pytest.raises(ValueError, match="`a.txt` cannot be read any more: No such file"):
        corpus.tokens[:]


def test_more_files_than_may_be_open(folder):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        Path("many").mkdir()
        for number in range(300):
            Path("many", f"{number:03}").write_text("ab")
        assert len(open_corpus("many", vocab=256).tokens[:]) == 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        tokens_module._mapped.cache_clear()


def refused(paths, **how) -> str:
    with pytest.raises(ValueError) as error:
        open_corpus(paths, **{"vocab": 256, **how})
    return str(error.value)


def test_what_is_not_there(folder):
    Path("wiki.txt").write_text("x")
    Path("none/.git").mkdir(parents=True)
    Path("none/.git/config").write_text("x")
    assert refused("wikki.txt") == "there is no file or folder `wikki.txt`; did you mean `wiki.txt`?"
    assert refused(folder / "quite/else") == f"there is no file or folder `{folder}/quite/else`"
    assert refused("none") == "the folder `none` has no file of data"
    assert refused([]) == "there is no data: not one path is given"
    assert refused("/dev/null") == "`/dev/null` is neither a file nor a folder"


def test_what_is_empty(folder):
    Path("a.txt").write_bytes(b"")
    lines(Path("b.jsonl"), {"text": ""})
    Path("c.jsonl").write_text("\n")
    np.save("d.npy", np.zeros(0, np.int32))
    for name in "a.txt", "b.jsonl", "c.jsonl", "d.npy":
        assert refused(name) == f"`{name}` is empty: it has no token"


@pytest.mark.parametrize("before", [0, 5, (1 << 18) - 2, (1 << 18) - 1, 1 << 18, 3 << 18])
@pytest.mark.parametrize("bad, at", [(b"\xff", 0), (b"\xe2\x82", 0), (b"ab\xe2\x82x", 2)])
def test_no_utf8(folder, before, bad, at):
    Path("a.txt").write_bytes(b"." * before + bad)
    assert refused("a.txt") == f"`a.txt` is no UTF-8 text: byte 0x{bad[at]:02x} at offset {before + at}"


@pytest.mark.parametrize("line, message", [
    (b'{"text": "a"', "broken JSON: Expecting ',' delimiter at character 13"),
    (b'{"texts": "a"}', "there is no field `text`; did you mean `texts`?"),
    (b'{"id": 1, "body": 2}', "there is no field `text`; it has `id`, `body`"),
    (b"{}", "there is no field `text`; it is empty"), (b'["text"]', 'an object is expected, not ["text"]'),
    (b'{"text": null}', "`text` must be text, not null"),
    (b'{"text": "a\xff"}', "no UTF-8 text: byte 0xff, 11 bytes in"),
    (b'{"text": "\\ud800"}', "`text` has half a character, '\\ud800'"), (b"[" * 100_000, "nested too deeply"),
])
def test_broken_lines(folder, line, message):
    Path("a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    found = refused("a.jsonl")
    assert found.startswith("`a.jsonl`, line 3: ") and message in found
    assert {path.suffix for path in Path(".cache/mambadsl").iterdir()} == {".lock"}


def test_arrays(folder):
    np.save("a.npy", np.arange(6, dtype=np.int32))
    assert open_corpus("a.npy", vocab=6).tokens[:].tolist() == [0, 1, 2, 3, 4, 5]
    assert "has the id 5 at token 5; the model's are from 0 to 4 (vocab = 5)" in refused("a.npy", vocab=5)
    np.save("b.npy", np.zeros((2, 3), np.int32))
    assert "whole numbers in one dimension, not int32 [2, 3]" in refused("b.npy")
    np.save("c.npy", np.zeros(3))
    assert "not float64 [3]" in refused("c.npy")
    Path("d.npy").write_bytes(b"text")
    assert "`d.npy` is damaged, or no file of numpy's" in refused("d.npy")
    np.save("e.npy", np.arange(600))
    Path("e.npy").write_bytes(Path("e.npy").read_bytes()[:-1])
    assert "`e.npy` is damaged" in refused("e.npy")


def test_small_vocabularies(folder):
    Path("a.txt").write_text("x")
    assert refused("a.txt", vocab=100) == "bytes need a vocabulary of at least 256 ids, and this model has 100"


def test_a_cache_among_the_data(folder):
    Path("data").mkdir()
    Path("data/a.txt").write_text("x")
    assert "the cache `data/made` lies in `data`" in refused("data", cache=Path("data/made"))
    assert documents(open_corpus("data", vocab=256, cache=Path("data/.made"))) == [b"x"]
    lines(Path("b.jsonl"), {"text": "x"})
    assert "`data/a.txt" in refused("b.jsonl", cache=Path("data/a.txt/cache"))
