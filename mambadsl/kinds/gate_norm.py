"""The gate and the grouped RMS norm behind a scan, in torch. Letters: B batch, T time, I channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.norm import rms_norm

#: What z goes through before it is a gate.
GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


def gate_norm(
    y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor | None, *, order: str, groups: int, eps: float,
    gate: str = "silu", averaged: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The gate, silu or sigmoid of z, and the RMS norm over each of `groups` groups of channels, in float32; the result
    has the dtype of y. order: after_gate norm(y * gate), before_gate norm(y) * gate, none y * gate. averaged: where
    other ranks have channels of the groups too, makes the mean over all from [B, T, groups, 1], that over these."""
    y, scale = y_BTI.float(), GATES[gate](z_BTI.float())
    if order != "before_gate":
        y = y * scale
    if order != "none":
        y = rms_norm(y.unflatten(-1, (groups, -1)), None, eps=eps, averaged=averaged).flatten(-2) * weight_I.float()
    if order == "before_gate":
        y = y * scale
    return y.to(y_BTI.dtype)
