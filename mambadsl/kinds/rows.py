"""A batch as recurrent layers read it: every row's real tokens first and in order, padding after them.

From `Tokens` and the layer's state come the moves there and back, the documents, and which rows go on
with the state's document. Convolutions and scans then meet padding at the end of rows only, and
an initial state only where it is theirs. Torch. Letters: B batch (rows), T time, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.state import put
from mambadsl.kinds.tokens import PADDING, Tokens


@dataclass(frozen=True)
class Rows:
    """segments_BT: document numbers after packing; padding repeats the row's last one, so that it ends
    no document. lengths_B: real tokens of each row. Both None: no padding, one document a row.
    """

    segments_BT: Tensor | None = None
    lengths_B: Tensor | None = None
    #: Where each token goes in the packed row, and where each place of it came from; None: it stays.
    there_BT: Tensor | None = None
    back_BT: Tensor | None = None
    #: The state belongs to the row's first document; None: in every row.
    continues_B: Tensor | None = None
    #: The document that the row ends in; None: not kept, it is 0.
    last_B: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tokens, state: dict[str, Any] | None = None) -> Rows:
        """`state["segment"]` (int32 [B]) is the last document so far; without it, that is 0."""
        before_B = None if state is None else state.get("segment")
        segments_BT = tokens.segments_BT
        if segments_BT is None:
            if before_B is None:
                return cls()
            return cls(continues_B=before_B == 0, last_B=torch.zeros_like(before_B))
        if before_B is None:
            before_B = torch.zeros_like(segments_BT[:, 0])
        B, T = segments_BT.shape
        real_BT = segments_BT != PADDING
        lengths_B = real_BT.sum(1)
        index_BT = torch.arange(T, device=segments_BT.device).expand(B, T)
        there_BT = back_BT = None
        if T > 1:
            after_BT = lengths_B[:, None] + (~real_BT).cumsum(1)
            there_BT = torch.where(real_BT, real_BT.cumsum(1), after_BT) - 1
            back_BT = torch.empty_like(there_BT).scatter_(1, there_BT, index_BT)
            segments_BT = segments_BT.gather(1, back_BT)
        final_B1 = segments_BT.gather(1, (lengths_B[:, None] - 1).clamp_min(0))
        segments_BT = torch.where(index_BT < lengths_B[:, None], segments_BT, final_B1)
        empty_B = lengths_B == 0
        return cls(
            segments_BT, lengths_B, there_BT, back_BT,
            continues_B=empty_B | (segments_BT[:, 0] == before_B),
            last_B=torch.where(empty_B, before_B, final_B1[:, 0]),
        )

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Real tokens to the front of each row."""
        return x_BTD if self.there_BT is None else _move(x_BTD, self.there_BT)

    def unpack(self, y_BTD: Tensor) -> Tensor:
        """Every token back to its place."""
        return y_BTD if self.back_BT is None else _move(y_BTD, self.back_BT)

    def without_padding(self, x_BTD: Tensor) -> Tensor:
        """Zeros at the padding of packed rows."""
        if self.lengths_B is None:
            return x_BTD
        index_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        real_BT = index_T < self.lengths_B[:, None]
        return torch.where(real_BT[..., None], x_BTD, 0)

    def past(self, state: dict[str, Any] | None, name: str) -> Tensor | None:
        """The state tensor `name` [B, ...] that the first tokens go on from: zeros where they begin another
        document. None without a state."""
        if state is None:
            return None
        tensor = state[name]
        if self.continues_B is None:
            return tensor
        return torch.where(self.continues_B.view(-1, *(1,) * (tensor.dim() - 1)), tensor, 0)

    def keep(self, state: dict[str, Any] | None, **tensors: Tensor) -> None:
        """Writes the state after the last real token of each row."""
        if state is None:
            return
        for name, tensor in tensors.items():
            put(state, name, tensor)
        if self.last_B is not None:
            put(state, "segment", self.last_B)


def starts(segments_BT: Tensor) -> Tensor:
    """True where a document begins after another one in the row. [B, T] -> [B, T]"""
    starts_BT = torch.zeros_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return starts_BT


def _move(x_BTD: Tensor, to_BT: Tensor) -> Tensor:
    # A scatter, because its backward is a gather: no atomic additions, and the same sum each time.
    return torch.zeros_like(x_BTD).scatter(1, to_BT[..., None].expand_as(x_BTD), x_BTD)
