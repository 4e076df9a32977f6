"""The token shift of RWKV: each token mixed with the one before it in its document, channel by channel. Torch.

Letters: B batch, T time, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambadsl.kinds.rows import Rows, starts


def shifted(x_BTD: Tensor, rows: Rows, past_BD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each one of packed rows, zeros before a document's first; and the last real one of each row.
    past_BD: the token before the first (None: zeros)."""
    past_BD = torch.zeros_like(x_BTD[:, 0]) if past_BD is None else past_BD.to(x_BTD.dtype)
    x_BSD = torch.cat([past_BD[:, None], x_BTD], 1)
    before_BTD = x_BSD[:, :-1]
    if rows.segments_BT is None:
        return before_BTD, x_BSD[:, -1]
    before_BTD = torch.where(starts(rows.segments_BT)[..., None], 0, before_BTD)
    return before_BTD, x_BSD.gather(1, rows.lengths_B[:, None, None].expand(-1, 1, x_BTD.shape[-1]))[:, 0]


def mix(x_BTD: Tensor, before_BTD: Tensor, share_D: Tensor) -> Tensor:
    """`share` of each token, the rest of the one before it."""
    return torch.lerp(before_BTD, x_BTD, share_D)
