"""One projection by definition: one token, one output at a time. Letters: B batch, T time, D what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens, state: Any = None
) -> tuple[Tensor, Any]:
    bias = weights["out_proj.bias"] if f.bias else torch.zeros(dims.d_model)

    def token(x_D: Tensor) -> Tensor:
        return torch.stack([(row_D * x_D).sum() + b for row_D, b in zip(weights["out_proj.weight"], bias)])

    return torch.stack([torch.stack([token(x_D) for x_D in x_TD]) for x_TD in x_BTD]), state
