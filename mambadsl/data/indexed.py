"""Megatron-LM's indexed datasets: `NAME.bin`, ids one after another, and `NAME.idx`, which says where documents end.

The format (megatron/core/datasets/indexed_dataset.py), little-endian: the magic, version u64 = 1, dtype code u8, how
many sequences u64, how many document bounds u64; each sequence's length i32 and its byte in `.bin` i64; the bounds
i64, as numbers of sequences, from 0; for images, each sequence's mode i8. A document is one sequence or more.
ValueError, with the file, for an index that does not fit its ids or itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from mambadsl.data.cache import whole, with_suffix
from mambadsl.data.tokens import Piece

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
#: A length is an i32; longer documents are several sequences.
_LONGEST = 2**31 - 1


def read_indexed(name: Path) -> tuple[Piece, np.ndarray]:
    """The ids of `name`.bin, and where its documents end (int64, ascending; documents without a token are none)."""
    ids, index = with_suffix(name, ".bin"), with_suffix(name, ".idx")
    for path, other in (ids, index), (index, ids):
        if not path.is_file():
            raise ValueError(f"`{other}` has no `{path.name}` beside it: a `.bin` and an `.idx` belong together")
    dtype, lengths, bounds = _index(index)
    stops = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=stops[1:])
    size, wanted = ids.stat().st_size, int(stops[-1]) * np.dtype(dtype).itemsize
    if size != wanted:
        raise ValueError(f"`{ids}` has {size} bytes, and its index speaks of {wanted}: one of the two is damaged")
    ends = stops[bounds[1:]]
    return Piece.at(ids, dtype, int(stops[-1])), ends[np.diff(ends, prepend=0) > 0]


def _index(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """(dtype, each sequence's length, the documents' bounds) of a sound `.idx`."""

    def damaged(why: str) -> ValueError:
        return ValueError(f"`{path}` is damaged, or no index of Megatron's: {why}")

    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            raise damaged(f"it begins with {header[: len(_MAGIC)]!r}, not {_MAGIC!r}")
        if len(header) < _HEADER.size:
            raise damaged(f"its header has {len(header)} of {_HEADER.size} bytes")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1:
            raise damaged(f"its version is {version}; 1 is known")
        if code not in _CODES:
            raise damaged(f"its dtype has the code {code}; 1 to {max(_CODES)} are known")
        size, wanted = path.stat().st_size, _HEADER.size + 12 * sequences + 8 * documents
        if size not in (wanted, wanted + sequences):
            raise damaged(f"it has {size} bytes, and {sequences} sequences with {documents} bounds take {wanted}")
        lengths = np.fromfile(file, "<i4", sequences)
        places = np.fromfile(file, "<i8", sequences)
        bounds = np.fromfile(file, "<i8", documents)
        modes = np.fromfile(file, "|i1")
    if (lengths < 0).any():
        raise damaged(f"sequence {np.argmax(lengths < 0)} has the length {lengths.min()}")
    if modes.any():
        raise ValueError(f"`{path}` has sequences that are no text (mode {modes[modes != 0][0]})")
    expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(_CODES[code]).itemsize
    if (wrong := places != expected).any():
        at = int(np.argmax(wrong))
        raise damaged(f"sequence {at} lies at byte {places[at]}, and those before it end at {expected[at]}")
    if not documents or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        found = f"from {bounds[0]} to {bounds[-1]}" if documents else "none"
        raise damaged(f"the documents' bounds must go up from 0 to {sequences}, the sequences; they are {found}")
    return _CODES[code], lengths, bounds


def write_indexed(
    name: Path, documents: Iterable[Iterable[np.ndarray]], *, dtype: str, before_end: Callable[[], None]
) -> None:
    """Writes documents, each in pieces: `name`.bin, then `name`.idx, each complete or not at all. `before_end` may
    refuse what was written."""
    lengths: list[int] = []
    bounds = [0]
    with whole(with_suffix(name, ".bin")) as out:
        for document in documents:
            count = 0
            for ids in document:
                out.write(ids.astype(dtype, copy=False).tobytes())
                count += len(ids)
            full, rest = divmod(count, _LONGEST)
            lengths += [_LONGEST] * full + [rest] * (rest > 0)
            bounds.append(len(lengths))
        before_end()
    [code] = [code for code, known in _CODES.items() if known == dtype]
    sizes = np.array(lengths, np.int64)
    places = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    with whole(with_suffix(name, ".idx")) as out:
        out.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(bounds)))
        for array, form in (sizes, "<i4"), (places, "<i8"), (np.array(bounds), "<i8"):
            out.write(array.astype(form).tobytes())
