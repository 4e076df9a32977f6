"""`.bin` and `.idx` against bytes by hand, from the format."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed_by_hand import by_hand

from mambadsl.data.corpus import open_corpus
from mambadsl.data.indexed import read_indexed, write_indexed

#: Code in the file, struct's letter.
CODES = [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (6, "d"), (7, "f"), (8, "H")]


@pytest.mark.parametrize("code, letter", CODES)
def test_every_dtype_of_the_format(tmp_path, code, letter):
    by_hand(tmp_path / "d", code, letter, [[1, 2, 3], [4], [5, 6]], [0, 1, 2, 3])
    for named in "d", "d.bin", "d.idx":
        corpus = open_corpus(tmp_path / named, vocab=100)
        assert corpus.tokens[:].tolist() == [1, 2, 3, 4, 5, 6] and corpus.ends.tolist() == [3, 4, 6]
    assert corpus.tokens[2:5].dtype == corpus.ends.dtype == np.int64


def test_documents_of_several_sequences_and_of_none(tmp_path):
    by_hand(tmp_path / "d", 8, "H", [[1, 2], [], [3], [], [4, 5]], [0, 0, 2, 3, 4, 4, 5])
    corpus = open_corpus(tmp_path / "d", vocab=100)
    assert corpus.tokens[:].tolist() == [1, 2, 3, 4, 5] and corpus.ends.tolist() == [2, 3, 5]


def test_what_we_write_is_the_format(tmp_path):
    by_hand(tmp_path / "a.b", 8, "H", [[1, 2], [3]], [0, 1, 2])
    write_indexed(tmp_path / "c.d", [[np.array([1]), np.array([2])], [np.array([3])]], dtype="<u2", before_end=bool)
    for suffix in ".bin", ".idx":
        assert (tmp_path / f"a.b{suffix}").read_bytes() == (tmp_path / f"c.d{suffix}").read_bytes()


def test_long_documents_are_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr("mambadsl.data.indexed._LONGEST", 3)
    documents = [[np.arange(n)] for n in (7, 3, 0, 1, 6)]
    write_indexed(tmp_path / "d", documents, dtype="<u2", before_end=bool)
    piece, ends = read_indexed(tmp_path / "d")
    assert ends.tolist() == [7, 10, 11, 17] and piece.count == 17


SOUND = [[1, 2, 3], [4], [5, 6]]
BROKEN = {
    "no index of Megatron's: it begins with b'NPIDIDX": lambda idx: b"N" + b"P" + idx[2:],
    "begins with b''": lambda idx: b"",
    "its header has 20 of 34 bytes": lambda idx: idx[:20],
    "its version is 2; 1 is known": lambda idx: idx[:9] + struct.pack("<Q", 2) + idx[17:],
    "has the code 9; 1 to 8 are known": lambda idx: idx[:17] + b"\x09" + idx[18:],
    "has 101 bytes, and 3 sequences with 4 bounds take 102": lambda idx: idx[:-1],
    f"and {2**63} sequences": lambda idx: idx[:18] + struct.pack("<Q", 2**63) + idx[26:],
    "sequence 1 has the length -1": lambda idx: idx[:38] + struct.pack("<i", -1) + idx[42:],
    "sequence 1 lies at byte 7, and those before it end at 6": lambda idx: idx[:54] + struct.pack("<q", 7) + idx[62:],
    "must go up from 0 to 3, the sequences; they are from 0 to 2": lambda idx: idx[:-8] + struct.pack("<q", 2),
    "they are from 1 to 3": lambda idx: idx[:-32] + struct.pack("<4q", 1, 1, 2, 3),
    "up from 0 to 3": lambda idx: idx[:-32] + struct.pack("<4q", 0, 2, 1, 3),
    "bytes, and its index speaks of 14": lambda idx: idx[:42] + struct.pack("<i", 3) + idx[46:],
    "are no text (mode 1)": lambda idx: idx + b"\0\1\0",
}


@pytest.mark.parametrize("message", BROKEN)
def test_damaged_indices(tmp_path, message):
    by_hand(tmp_path / "d", 8, "H", SOUND, [0, 1, 2, 3])
    index = tmp_path / "d.idx"
    index.write_bytes(BROKEN[message](index.read_bytes()))
    with pytest.raises(ValueError) as error:
        open_corpus(tmp_path / "d.bin", vocab=100)
    assert message in str(error.value) and str(tmp_path / "d.") in str(error.value)


@given(st.data())
def test_no_bytes_crash_the_reader(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("index")
    by_hand(folder / "d", 8, "H", SOUND, [0, 1, 2, 3])
    index = folder / "d.idx"
    content = bytearray(index.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    index.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        corpus = open_corpus(folder / "d", vocab=100)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert corpus.ends[-1] == len(corpus.tokens) == len(corpus.tokens[:])


def test_half_a_pair(tmp_path):
    by_hand(tmp_path / "d", 8, "H", SOUND, [0, 1, 2, 3])
    (tmp_path / "d.idx").rename(tmp_path / "e.idx")
    with pytest.raises(ValueError, match=r"d\.bin` has no `d\.idx` beside it"):
        open_corpus(tmp_path / "d.bin", vocab=100)
    with pytest.raises(ValueError, match=r"e\.idx` has no `e\.bin` beside it"):
        open_corpus(tmp_path / "e", vocab=100)


@pytest.mark.parametrize("code, letter, ids, found", [
    (8, "H", [1, 2, 300, 4], "300 at token 2"), (4, "i", [1, -2, 3, 4], "-2 at token 1"),
    (7, "f", [float("nan"), 1, 2, 3], "nan at token 0, which is no id"),
    (7, "f", [1, 2.5, 3, 4], "2.5 at token 1, which is no id"),
    (6, "d", [1, 2, 3, float("inf")], "inf at token 3, which is no id"), (1, "B", [255, 2, 3, 4], "255 at token 0"),
])
def test_ids_that_the_model_does_not_have(tmp_path, code, letter, ids, found):
    by_hand(tmp_path / "d", code, letter, [ids[:2], ids[2:]], [0, 1, 2])
    with pytest.raises(ValueError) as error:
        open_corpus(tmp_path / "d.bin", vocab=100)
    assert found in str(error.value) and "d.bin" in str(error.value)
