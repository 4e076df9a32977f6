"""Ids of a file that somebody else wrote: whether the model has them all."""

from __future__ import annotations

import math

import numpy as np

from mambadsl.data.cache import Cache, Stamp
from mambadsl.data.tokens import Piece

_CHUNK = 1 << 24


def hold(piece: Piece, *, vocab: int, cache: Cache) -> None:
    """ValueError for the first of the lowest or highest ids that is not from 0 to vocab - 1. A file is looked through
    where its dtype has other numbers."""
    kind = np.dtype(piece.dtype)
    if kind.kind == "u" and np.iinfo(kind).max < vocab:
        return
    found = cache.fact(Stamp.of(piece.path), "ids", repr(piece.dtype), find=lambda: _extremes(piece))
    for id, at in found:
        if not 0 <= id < vocab:
            raise ValueError(
                f"`{piece.path}` has the id {id} at token {at}; the model's are from 0 to {vocab - 1} (vocab = {vocab})"
            )


def _extremes(piece: Piece) -> list[tuple[int, int]]:
    """The lowest id and where it is first, and the highest."""
    ids = piece.array()
    lowest, highest = (math.inf, 0), (-math.inf, 0)
    for start in range(0, piece.count, _CHUNK):
        chunk = ids[start : start + _CHUNK]
        if chunk.dtype.kind == "f" and (bad := ~np.isfinite(chunk) | (chunk != np.floor(chunk))).any():
            at = int(np.argmax(bad))
            raise ValueError(f"`{piece.path}` has {chunk[at]} at token {start + at}, which is no id")
        # Looking for the least is several times as fast as looking for its place.
        if chunk.min() < lowest[0]:
            lowest = int(chunk.min()), start + int(chunk.argmin())
        if chunk.max() > highest[0]:
            highest = int(chunk.max()), start + int(chunk.argmax())
    return [lowest, highest] if piece.count else []
