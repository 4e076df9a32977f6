"""The gated short convolution, slow and obvious: row by row, token by token. The definition that the module and
every kernel are held to; it shares no code with them.

Letters: D d_model, I d_inner, J d_conv - 1 earlier inputs, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.recurrence import token_by_token
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens,
    state: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """weights: by the names of the kind's table. state: {"conv" [B, I, J]} and, where it is not 0, "segment" [B].
    Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        B_I, C_I, x_I = (w["in_proj.weight"] @ x_D + w.get("in_proj.bias", 0)).split(f.d_inner)
        window_IK = torch.cat([now["conv"], (B_I * x_I)[:, None]], dim=1)
        mixed_I = (window_IK * w["conv.weight"]).sum(1) + w.get("conv.bias", 0)
        return w["out_proj.weight"] @ (C_I * mixed_I) + w.get("out_proj.bias", 0), {"conv": window_IK[:, 1:]}

    shapes = {"conv": (f.d_inner, f.d_conv - 1)}
    return token_by_token(step, shapes, x_BTD, tokens, state, d_model=dims.d_model)
