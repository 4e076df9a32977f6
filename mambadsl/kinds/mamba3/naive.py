"""Mamba-3, slow and obvious: row by row, token by token, head by head, as the paper's equations have it. The definition
that the module and every kernel are held to; it shares no code with them.

Letters: D d_model, H heads, P head_dim, N d_state, G groups, R rank, A angles.
"""

from __future__ import annotations

import math
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
    """weights: by the names of the kind's table. state: {"ssm" [B, H, P, N], "angle" [B, H, A], "k" [B, H, R, N],
    "x" [B, H, P]} and, where it is not 0, "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All
    in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    H, P, N, R = f.heads, f.head_dim, f.d_state, f.rank
    A = int(N * f.rope_fraction) // 2
    shapes = {"ssm": (H, P, N), "angle": (H, A), "k": (H, R, N), "x": (H, P)}

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        heads = [one_head(w, f, A, h, w["in_proj.weight"] @ x_D, now) for h in range(H)]
        y, states = zip(*heads)
        after = {name: torch.stack([s[name] for s in states]) for name in shapes}
        return w["out_proj.weight"] @ torch.cat(y), after

    return token_by_token(step, shapes, x_BTD, tokens, state, d_model=dims.d_model)


def one_head(
    w: Mapping[str, Tensor], f: Values, A: int, h: int, projected: Tensor, before: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    H, P, N, R, G = f.heads, f.head_dim, f.d_state, f.rank, f.groups
    z, x, B, C, dt, a, trap, angle = projected.split([H * P, H * P, R * G * N, R * G * N, H, H, H, A])
    z_P, x_P = z.view(H, P)[h], x.view(H, P)[h]
    dt = F.softplus(dt[h] + w["dt_bias"][h])
    decay = torch.exp(-torch.clamp(F.softplus(a[h]), min=f.a_floor) * dt)
    share = torch.sigmoid(trap[h])
    angle_A = (before["angle"][h] + math.pi * torch.tanh(angle) * dt) % (2 * math.pi)
    g = h // (H // G)
    k_RN, q_RN = (
        torch.stack([turn(rms(t.view(R, G, N)[r, g], w[f"{name}_norm.weight"], f) + w[f"{name}_bias"][h, r], angle_A)
                     for r in range(R)])
        for name, t in (("b", B), ("c", C))
    )
    state_PN = decay * before["ssm"][h]
    y_P = torch.zeros(P)
    for r in range(R):
        mix_P = w["rank_x"][h, r] if R > 1 else 1
        state_PN = state_PN + decay * (1 - share) * dt * torch.outer(mix_P * before["x"][h], before["k"][h, r])
        state_PN = state_PN + share * dt * torch.outer(mix_P * x_P, k_RN[r])
    for r in range(R):
        mix_P, gate_P, out_P = (w[f"rank_{name}"][h, r] if R > 1 else 1 for name in ("x", "z", "out"))
        out = state_PN @ q_RN[r] + w["D"][h] * mix_P * x_P
        if f.gated_norm == "before_gate":
            out = rms(out, w["gate_norm.weight"].view(H, P)[h], f)
        y_P = y_P + out * F.silu(gate_P * z_P) * out_P
    return y_P, {"ssm": state_PN, "angle": angle_A, "k": k_RN, "x": x_P}


def turn(t_N: Tensor, angle_A: Tensor) -> Tensor:
    out = list(t_N)
    for i, angle in enumerate(angle_A):
        a, b = t_N[2 * i], t_N[2 * i + 1]
        out[2 * i] = a * torch.cos(angle) - b * torch.sin(angle)
        out[2 * i + 1] = a * torch.sin(angle) + b * torch.cos(angle)
    return torch.stack(out)


def rms(t: Tensor, weight: Tensor, f: Values) -> Tensor:
    return t / torch.sqrt((t * t).mean() + f.norm_eps) * weight
