"""The gated memory unit by definition, one token at a time, activations from their formulas.

Letters: B batch, T time, D d_model, I d_inner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.mlp.naive import FORMULAS
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens, state: Any = None, *,
    scan: Tensor,
) -> tuple[Tensor, Any]:
    """scan: [B, T, I], of a layer above."""

    def token(x_D: Tensor, scan_I: Tensor) -> Tensor:
        gate_I = FORMULAS[f.act](weights["in_proj.weight"] @ x_D + weights.get("in_proj.bias", 0))
        return weights["out_proj.weight"] @ (gate_I * scan_I) + weights.get("out_proj.bias", 0)

    rows = zip(x_BTD, scan)
    return torch.stack([torch.stack([token(x_D, s_I) for x_D, s_I in zip(x_TD, s_TI)]) for x_TD, s_TI in rows]), state
