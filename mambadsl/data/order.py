"""The order of training rows: a permutation that is computed place by place, so that nothing of it is stored.

A generalised Feistel network over pairs below ceil(sqrt(count)), walked until it is back below `count` (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002). Arithmetic only: the same in every version of every library.
"""

from __future__ import annotations

import math

_ROUNDS = 8
_WORD = 2**64 - 1


def row_of(sample: int, *, count: int, seed: int) -> int:
    """The row at a place of the endless order. Samples e * count to (e + 1) * count, epoch e, are all `count` rows
    once, in an order of (seed, e)."""
    epoch, row = divmod(sample, count)
    key = _mixed(_mixed(seed & _WORD) + epoch)
    side = math.isqrt(count - 1) + 1
    while True:
        left, right = divmod(row, side)
        for turn in range(_ROUNDS):
            left, right = right, (left + _mixed(_mixed(key + turn) ^ right)) % side
        row = left * side + right
        if row < count:
            return row


def _mixed(x: int) -> int:
    """splitmix64: 64 bits to 64 that look random."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)
