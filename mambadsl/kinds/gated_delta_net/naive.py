"""Gated DeltaNet, slow and obvious: row by row, token by token, head by head. The definition that the module and every
kernel are held to; it shares no code with them.

Letters: D d_model, H heads, K key_heads, E key_dim, P value_dim, C channels of the convolution, J d_conv - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
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
    """weights: by the names of the kind's table. state: {"conv" [B, C, J], "delta" [B, H, E, P]} and, where it is not
    0, "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    shapes = {"conv": (w["conv.weight"].shape[0], f.d_conv - 1), "delta": (f.heads, f.key_dim, f.value_dim)}

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y_D, conv, delta = one_token(w, f, x_D, now["conv"], now["delta"])
        return y_D, {"conv": conv, "delta": delta}

    return token_by_token(step, shapes, x_BTD, tokens, state, d_model=dims.d_model)


def one_token(
    w: Mapping[str, Tensor], f: Values, x_D: Tensor, conv_CJ: Tensor, delta_HEP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    H, K, E, P = f.heads, f.key_heads, f.key_dim, f.value_dim
    qkv_C, z, b, a = (w["in_proj.weight"] @ x_D).split([2 * K * E + H * P, H * P, H, H])
    window_CK = torch.cat([conv_CJ, qkv_C[:, None]], dim=1)
    mixed_C = F.silu((window_CK * w["conv.weight"]).sum(1) + w.get("conv.bias", 0))
    q, k, v = mixed_C.split([K * E, K * E, H * P])
    q_KE, k_KE, v_HP, z_HP = q.view(K, E), k.view(K, E), v.view(H, P), z.view(H, P)
    states, y = [], []
    for h in range(H):
        q_E, k_E = (t[h // (H // K)] for t in (q_KE, k_KE))
        q_E, k_E = (t / torch.sqrt((t * t).sum() + f.qk_eps) for t in (q_E, k_E))
        beta = torch.sigmoid(b[h]) * (2 if f.negative_eigenvalues else 1)
        decay = torch.exp(-torch.exp(w["A_log"][h]) * F.softplus(a[h] + w["dt_bias"][h]))
        state_EP = decay * delta_HEP[h]
        state_EP = state_EP + torch.outer(k_E, beta * (v_HP[h] - k_E @ state_EP))
        y_P = (q_E / sqrt(E)) @ state_EP
        y_P = y_P / torch.sqrt((y_P * y_P).mean() + f.norm_eps) * w["gate_norm.weight"] * F.silu(z_HP[h])
        states.append(state_EP)
        y.append(y_P)
    return w["out_proj.weight"] @ torch.cat(y), window_CK[:, 1:], torch.stack(states)
