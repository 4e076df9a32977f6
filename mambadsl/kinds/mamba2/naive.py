"""Mamba-2, slow and obvious: row by row, token by token. The definition that the module and every
kernel are held to; it shares no code with them.

Letters: D d_model, H heads, P head_dim, N d_state, G groups, C channels of the convolution, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.recurrence import token_by_token
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens,
    state: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """weights: by the names of the kind's table. state: {"conv" [B, C, K-1], "ssm" [B, H, P, N]} and, where
    it is not 0, "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    shapes = {"conv": (w["conv.weight"].shape[0], f.d_conv - 1), "ssm": (f.heads, f.head_dim, f.d_state)}

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y_D, conv, ssm = one_token(w, f, x_D, now["conv"], now["ssm"])
        return y_D, {"conv": conv, "ssm": ssm}

    return token_by_token(step, shapes, x_BTD, tokens, state, d_model=dims.d_model)


def one_token(
    w: Mapping[str, Tensor], f: Values, x_D: Tensor, conv_CJ: Tensor, ssm_HPN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    H, P, G, N = f.heads, f.head_dim, f.groups, f.d_state
    projected = w["in_proj.weight"] @ x_D + w.get("in_proj.bias", 0)
    parts = projected.split([H * P, H * P, G * N, G * N, H])
    z, x, B, C, dt = (part * scale for part, scale in zip(parts, f.proj_multipliers))

    window_CK = torch.cat([conv_CJ, torch.cat([x, B, C])[:, None]], dim=1)
    mixed_C = F.silu((window_CK * w["conv.weight"]).sum(1) + w.get("conv.bias", 0))
    x, B, C = mixed_C.split([H * P, G * N, G * N])
    x_HP, B_GN, C_GN = x.view(H, P), B.view(G, N), C.view(G, N)

    low, high = f.dt_limit
    dt_H = F.softplus(dt + w["dt_bias"]).clamp(low, high)
    A_H = -w["A_log"].exp()
    states, y = [], []
    for h in range(H):
        g = h // (H // G)
        state_PN = torch.exp(dt_H[h] * A_H[h]) * ssm_HPN[h] + dt_H[h] * torch.outer(x_HP[h], B_GN[g])
        states.append(state_PN)
        y.append(state_PN @ C_GN[g] + w["D"][h] * x_HP[h])
    y_I = torch.cat(y)

    if f.gated_norm == "after_gate":
        y_I = group_norm(y_I * F.silu(z), f) * w["gate_norm.weight"]
    elif f.gated_norm == "before_gate":
        y_I = group_norm(y_I, f) * w["gate_norm.weight"] * F.silu(z)
    else:
        y_I = y_I * F.silu(z)
    return w["out_proj.weight"] @ y_I + w.get("out_proj.bias", 0), window_CK[:, 1:], torch.stack(states)


def group_norm(y_I: Tensor, f: Values) -> Tensor:
    return torch.cat([
        group / torch.sqrt((group**2).mean() + f.norm_eps) for group in y_I.chunk(f.norm_groups)
    ])
