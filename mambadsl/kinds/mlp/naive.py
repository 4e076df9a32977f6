"""The feed-forward layer by definition: one token at a time, activations from their formulas.

Letters: B batch, T time, D d_model, F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values

FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu2": lambda x: torch.where(x > 0, x, 0.0) ** 2,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
}


def hidden(up_D: Tensor, *, act: str, gated: bool, gate_multiplier: float = 1) -> Tensor:
    """Hidden values of one token from its first projection (its first half is the gate)."""
    if not gated:
        return FORMULAS[act](up_D)
    F = up_D.shape[0] // 2
    return FORMULAS[act](up_D[:F] * gate_multiplier) * up_D[F:]


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens, state: Any = None
) -> tuple[Tensor, Any]:
    name = "gate_up_proj" if f.gated else "up_proj"

    def token(x_D: Tensor) -> Tensor:
        up = weights[f"{name}.weight"] @ x_D
        up = up + weights[f"{name}.bias"] if f.bias else up
        h_F = hidden(up, act=f.act, gated=f.gated, gate_multiplier=f.gate_multiplier)
        y_D = weights["down_proj.weight"] @ h_F
        return y_D + weights["down_proj.bias"] if f.bias else y_D

    return torch.stack([torch.stack([token(x_D) for x_D in x_TD]) for x_TD in x_BTD]), state
