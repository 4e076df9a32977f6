"""What a batch of tokens is, beside their ids: one description for convolution, scan and attention.

Torch; imported by kinds' modules and `build/` only. Letters: B batch (rows), T time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Tokens:
    """positions_BT: int64, the place of each token in its own document (rope reads it).
    segments_BT: int32 document number of each token, non-decreasing along a row where not PADDING;
    PADDING (-1) marks tokens that do not exist. None: every row is one document without padding.

    Nothing flows from one document to another, nor from padding to anywhere, in any layer; outputs at
    padding are unspecified but finite. With a state, a chunk continues the document it ended in when
    the segment numbers agree (None counts as 0).
    """

    positions_BT: Tensor
    segments_BT: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.positions_BT.shape[0]

    @property
    def length(self) -> int:
        return self.positions_BT.shape[1]

    @classmethod
    def plain(cls, batch: int, length: int, *, start: int = 0, device=None) -> Tokens:
        """One document a row; the first token has position `start`."""
        positions_T = torch.arange(start, start + length, device=device)
        return cls(positions_T.expand(batch, length))

    @classmethod
    def packed(cls, segments_BT: Tensor) -> Tokens:
        """Positions from document numbers: they restart at each document, and skip padding."""
        B, T = segments_BT.shape
        index_BT = torch.arange(T, device=segments_BT.device).expand(B, T)
        first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
        first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        start_BT = torch.where(first_BT, index_BT, 0).cummax(1).values
        return cls(index_BT - start_BT, segments_BT.to(torch.int32))

    @classmethod
    def padded(cls, valid_BT: Tensor) -> Tokens:
        """One document a row with padding on the left, the right, or both."""
        segments_BT = torch.where(valid_BT, 0, PADDING).to(torch.int32)
        positions_BT = (valid_BT.long().cumsum(1) - 1).clamp_min(0)
        return cls(positions_BT, segments_BT)
