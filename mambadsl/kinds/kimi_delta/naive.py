"""Kimi Delta Attention, slow and obvious: row by row, token by token, head by head. The definition that the module and
every kernel are held to; it shares no code with them.

Letters: D d_model, H heads, E key_dim, P value_dim, C channels of the convolution, J d_conv - 1.
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
    H, E, P = f.heads, f.key_dim, f.value_dim
    gate_width, decay_width = f.gate_rank or H * P, f.decay_rank or H * E
    qkv_C, z, b_H, a = (w["in_proj.weight"] @ x_D).split([2 * H * E + H * P, gate_width, H, decay_width])
    z_HP = (w["gate_proj.weight"] @ z if f.gate_rank else z).view(H, P)
    a_HE = (w["decay_proj.weight"] @ a if f.decay_rank else a).view(H, E)
    window_CK = torch.cat([conv_CJ, qkv_C[:, None]], dim=1)
    mixed_C = F.silu((window_CK * w["conv.weight"]).sum(1) + w.get("conv.bias", 0))
    q, k, v = mixed_C.split([H * E, H * E, H * P])
    q_HE, k_HE, v_HP, bias_HE = q.view(H, E), k.view(H, E), v.view(H, P), w["dt_bias"].view(H, E)
    states, y = [], []
    for h in range(H):
        q_E, k_E = (t / torch.sqrt((t * t).sum() + f.qk_eps) for t in (q_HE[h], k_HE[h]))
        rate, forget_E = torch.exp(w["A_log"][h]), a_HE[h] + bias_HE[h]
        if f.decay.name == "softplus":
            decay_E = torch.exp(-rate * F.softplus(forget_E))
        else:
            decay_E = torch.exp(f.decay.lower_bound * torch.sigmoid(rate * forget_E))
        state_EP = decay_E[:, None] * delta_HEP[h]
        state_EP = state_EP + torch.outer(k_E, torch.sigmoid(b_H[h]) * (v_HP[h] - k_E @ state_EP))
        y_P = (q_E / sqrt(E)) @ state_EP
        y_P = y_P / torch.sqrt((y_P * y_P).mean() + f.norm_eps) * w["gate_norm.weight"] * torch.sigmoid(z_HP[h])
        states.append(state_EP)
        y.append(y_P)
    return w["out_proj.weight"] @ torch.cat(y), window_CK[:, 1:], torch.stack(states)
