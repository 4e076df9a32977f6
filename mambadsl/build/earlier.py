"""The residual form `attend` and the `narrow` of that name: what is read of the states at which blocks began
(`kinds/earlier.py`).

Within a stage the states are tensors apart, last the block's at hand, so that layers of a block have the same ones and
none is copied or kept twice; where stages meet, and before `narrow`, they lie side by side as all streams do.
Letters: B batch, T time, N states, D d_model, S = N * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mambadsl.build.residual import Add
from mambadsl.kinds.module import Declared

#: [B, T, D] each.
States: TypeAlias = tuple[Tensor, ...]


def apart(x_BTS: Tensor, d_model: int) -> States:
    """The states that lie side by side, each in memory of its own."""
    return tuple(x_BTD.contiguous() for x_BTD in x_BTS.split(d_model, -1))


class Attend(Add):
    """How many states there are, the stream says: uses of a shared layer may read different numbers."""

    def read(self, x: States, t_BTD: Tensor | None) -> tuple[Tensor, Any]:
        return x[0] if len(x) == 1 else attended(x, self), None

    def write(self, x: States, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> States:
        *past, p_BTD = x
        y_BTD = y_BTD.to(p_BTD.dtype)
        return (*x, y_BTD) if self.form.begins else (*past, p_BTD + y_BTD)


def attended(x: Sequence[Tensor], by: Declared) -> Tensor:
    """One state of several, [B, T, D] in their dtype, computed in float32. by: has `form`, `query` and, where the form
    says so, `keys.weight`. No key is made: norms are factors of the logits and the shares. For the backward pass the
    states are kept as they are, which all layers do: operators widen them by themselves."""
    form, d_model = by.form, x[0].shape[-1]
    g_D = by.keys.weight if form.weight else None
    query_D = by.query if g_D is None else by.query * g_D
    scale = d_model**-0.5 if form.scale is None else form.scale
    norm_BTN = torch.stack([torch.linalg.vector_norm(s, dim=-1, dtype=torch.float32) for s in x], -1)
    rms_BTN = torch.rsqrt(norm_BTN.square() / d_model + form.norm_eps)
    raw_BTN = torch.stack([(s * query_D).sum(-1) for s in x], -1)
    share_BTN = torch.softmax(raw_BTN * rms_BTN * scale, -1)
    keys = form.reads == "keys"
    weight_BTN = share_BTN * rms_BTN if keys else share_BTN
    h_BTD = sum(w_BT[..., None] * s for w_BT, s in zip(weight_BTN.unbind(-1), x))
    return (h_BTD * g_D if keys and g_D is not None else h_BTD).to(x[0].dtype)
