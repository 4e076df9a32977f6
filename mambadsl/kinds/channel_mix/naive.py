"""RWKV-4's channel mixing, slow and obvious: row by row, token by token. The definition that the module and every
kernel are held to; it shares no code with them. Letters: D d_model."""

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
    """weights: by the names of the kind's table. state: {"shift" [B, D]} and, where it is not 0, "segment" [B]. Returns
    y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        for_k_D, for_r_D = (w[name] * x_D + (1 - w[name]) * now["shift"] for name in ("mix_k", "mix_r"))
        up_F = w["up_proj.weight"] @ for_k_D
        down_D = w["down_proj.weight"] @ torch.where(up_F > 0, up_F * up_F, 0.0)
        return torch.sigmoid(w["r_proj.weight"] @ for_r_D) * down_D, {"shift": x_D}

    return token_by_token(step, {"shift": (x_BTD.shape[-1],)}, x_BTD, tokens, state, d_model=dims.d_model)
