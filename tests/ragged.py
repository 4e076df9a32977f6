"""Rows with everything that can befall a batch: documents, padding anywhere, rows that are only padding."""

from __future__ import annotations

import torch

from mambadsl.kinds.tokens import Tokens

#: Two documents and padding; one long document; padding inside a document; nothing but padding.
SEGMENTS = torch.tensor([
    [-1, 0, 0, 0, 0, 1, 1, 1, -1, -1],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, -1, -1, 0, 0, 3, 3, 3, 3],
    [-1, -1, -1, -1, -1, -1, -1, -1, -1, -1],
], dtype=torch.int32)
POSITIONS = torch.tensor([
    [0, 0, 1, 2, 3, 0, 1, 2, 0, 0],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    [0, 1, 0, 0, 2, 3, 0, 1, 2, 3],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
])
#: [4, 10]: which tokens exist.
REAL = SEGMENTS >= 0


def ragged() -> Tokens:
    return Tokens(POSITIONS, SEGMENTS)


def part_of(tokens: Tokens, start: int, end: int) -> Tokens:
    """The chunk from `start` to `end` of every row."""
    segments_BT = None if tokens.segments_BT is None else tokens.segments_BT[:, start:end]
    return Tokens(tokens.positions_BT[:, start:end], segments_BT)
