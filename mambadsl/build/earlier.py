"""The residual form `attend` and the `narrow` of that name: what is read of the states at which blocks began
(`kinds/earlier.py`).

Letters: B batch, T time, N states (the last is the block's at hand), D d_model, S = N * D the states side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.build.residual import Add
from mambadsl.kinds.module import Declared


class Attend(Add):
    """How many states there are, the stream says by its width: uses of a shared layer may read different numbers."""

    def read(self, x_BTS: Tensor, t_BTD: Tensor | None) -> tuple[Tensor, Any]:
        if x_BTS.shape[-1] == self.d_model:
            return x_BTS, None
        return attended(x_BTS.unflatten(-1, (-1, self.d_model)), self), None

    def write(self, x_BTS: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        y_BTD = y_BTD.to(x_BTS.dtype)
        if self.form.begins:
            return torch.cat((x_BTS, y_BTD), -1)
        past, own = x_BTS.shape[-1] - self.d_model, self.d_model
        s_BTS, p_BTD = x_BTS.split((past, own), -1)
        return torch.cat((s_BTS, p_BTD + y_BTD), -1) if past else x_BTS + y_BTD


def attended(x_BTND: Tensor, by: Declared) -> Tensor:
    """One state of several, [B, T, D] in their dtype, computed in float32. by: has `form`, `query` and, where the form
    says so, `keys.weight`. No key is made: norms are factors of the logits and the shares."""
    form, s_BTND = by.form, x_BTND.float()
    d_model = s_BTND.shape[-1]
    g_D = by.keys.weight if form.weight else None
    query_D = by.query if g_D is None else by.query * g_D
    scale = d_model**-0.5 if form.scale is None else form.scale
    rms_BTN = torch.rsqrt(s_BTND.square().mean(-1) + form.norm_eps)
    share_BTN = torch.softmax(F.linear(s_BTND, query_D[None])[..., 0] * rms_BTN * scale, -1)
    if form.reads == "states":
        return (share_BTN[..., None] * s_BTND).sum(-2).to(x_BTND.dtype)
    h_BTD = ((share_BTN * rms_BTN)[..., None] * s_BTND).sum(-2)
    return (h_BTD if g_D is None else h_BTD * g_D).to(x_BTND.dtype)
