"""RWKV-4's time mixing, slow and obvious: row by row, token by token. The definition that the module and every kernel
are held to; it shares no code with them.

Letters: D d_model, I d_inner.
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
    """weights: by the names of the kind's table. state: {"shift" [B, D], "values", "weight", "log_scale" [B, I]} and,
    where it is not 0, "segment" [B]; a weight of 0 or less is of no token yet. Returns y_BTD (zeros at padding) and the
    state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        k_I, v_I, r_I = (
            w[f"{name}_proj.weight"] @ (w[f"mix_{name}"] * x_D + (1 - w[f"mix_{name}"]) * now["shift"])
            for name in "kvr"
        )
        empty = now["weight"] <= 0
        a_I, b_I = (torch.where(empty, 0.0, now[name]) for name in ("values", "weight"))
        m_I = torch.where(empty, -1e30, now["log_scale"])

        top_I = torch.maximum(m_I, k_I + w["time_first"])
        old_I, new_I = torch.exp(m_I - top_I), torch.exp(k_I + w["time_first"] - top_I)
        y_I = (old_I * a_I + new_I * v_I) / (old_I * b_I + new_I)

        decayed_I = m_I - torch.exp(w["time_decay"])
        top_I = torch.maximum(decayed_I, k_I)
        old_I, new_I = torch.exp(decayed_I - top_I), torch.exp(k_I - top_I)
        after = {
            "shift": x_D, "values": old_I * a_I + new_I * v_I, "weight": old_I * b_I + new_I, "log_scale": top_I,
        }
        return w["out_proj.weight"] @ (torch.sigmoid(r_I) * y_I), after

    I = w["time_decay"].shape[0]
    shapes = {"shift": (x_BTD.shape[-1],), "values": (I,), "weight": (I,), "log_scale": (I,)}
    return token_by_token(step, shapes, x_BTD, tokens, state, d_model=dims.d_model)
