"""The order of training rows: a permutation that is computed place by place, so that nothing of it is stored.

A generalised Feistel network over pairs below ceil(sqrt(count)), walked until it is back below `count` (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002). Arithmetic only: the same in every version of every library.
"""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 8


def permuted(samples: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """Samples of the endless order -> rows, int64 [n]. Samples e * count to (e + 1) * count, epoch e, are all rows
    once, in an order of (seed, e)."""
    epochs, places = np.divmod(samples, count)
    keys = _mixed(_mixed(np.full(len(samples), seed % 2**64, np.uint64)) + epochs.astype(np.uint64))
    rows = places.astype(np.uint64)
    side = np.uint64(math.isqrt(count - 1) + 1)
    out = np.ones(len(rows), bool)
    while out.any():
        rows[out] = _shuffled(rows[out], keys[out], side)
        out = rows >= count
    return rows.astype(np.int64)


def _shuffled(places: np.ndarray, keys: np.ndarray, side: np.uint64) -> np.ndarray:
    """A permutation of the numbers below side**2."""
    left, right = places // side, places % side
    for turn in range(_ROUNDS):
        left, right = right, (left + _mixed(_mixed(keys + np.uint64(turn)) ^ right) % side) % side
    return left * side + right


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64, each number to one that looks random; overflow wraps."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
