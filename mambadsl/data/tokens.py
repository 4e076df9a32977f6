"""Token ids in files, read where they lie: a corpus may be larger than memory, and have more files than a process may
hold open.

In: `Piece`s, which say where ids are. Out: `Tokens`, one sequence of them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Piece:
    """`count` ids of a numpy dtype (`<u2`, ...) in a file of a certain age, from byte `offset`."""

    path: Path
    dtype: str
    count: int
    offset: int
    changed_ns: int

    @classmethod
    def at(cls, path: Path, dtype: str, count: int, *, offset: int = 0) -> Piece:
        return cls(path, dtype, count, offset, path.stat().st_mtime_ns)

    def array(self) -> np.ndarray:
        """All ids [count], memory-mapped. ValueError for a file that is another one by now, or gone."""
        return _mapped(self)


# Each map holds a file descriptor.
@lru_cache(maxsize=128)
def _mapped(piece: Piece) -> np.ndarray:
    try:
        if piece.path.stat().st_mtime_ns != piece.changed_ns:
            raise ValueError(f"`{piece.path}` was changed after it was opened")
        mapped = np.memmap(piece.path, dtype=piece.dtype, mode="r", offset=piece.offset, shape=(piece.count,))
    except OSError as error:
        raise ValueError(f"`{piece.path}` cannot be read any more: {error.strerror or error}") from None
    return mapped.view(np.ndarray)  # Slices of a memmap take ten times as long.


class Tokens:
    """The ids of several pieces, one after another. A slice (of step 1) is an int64 array; a number gives one id."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = tuple(pieces)
        self.stops = np.cumsum([piece.count for piece in self.pieces], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.stops[-1]) if len(self.pieces) else 0

    def __getitem__(self, at: slice | int) -> np.ndarray | int:
        if not isinstance(at, slice):
            place = at + len(self) if at < 0 else at
            if not 0 <= place < len(self):
                raise IndexError(f"token {at} of {len(self)}")
            return int(self[place : place + 1][0])
        start, stop, step = at.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in their order: a step of 1, not {step}")
        found = np.empty(max(stop - start, 0), np.int64)
        done = 0
        number = int(np.searchsorted(self.stops, start, side="right"))
        while done < len(found):
            piece = self.pieces[number]
            inside = start + done - int(self.stops[number]) + piece.count
            taken = piece.array()[inside : inside + len(found) - done]
            found[done : done + len(taken)] = taken
            done += len(taken)
            number += 1
        return found
