"""mLSTM, slow and obvious: row by row, token by token, head by head. The definition that the module and every kernel
are held to; it shares no code with them.

Letters: D d_model, H heads, E key_dim, P value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
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
    """weights: by the names of the kind's table. state: {"memory" [B, H, E, P], "keys" [B, H, E], "log_scale" [B, H]}
    and, where it is not 0, "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    H, E, P = f.heads, f.key_dim, f.value_dim

    def capped(g: Tensor) -> Tensor:
        return g if f.gate_softcap is None else f.gate_softcap * torch.tanh(g / f.gate_softcap)

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v, o, i_H, f_H = (w["in_proj.weight"] @ x_D).split([H * E, H * E, H * P, H * P, H, H])
        q, k, v = q.view(H, E) / sqrt(E), k.view(H, E), v.view(H, P)
        log_input, forget = capped(i_H + w["input_bias"]), torch.sigmoid(capped(f_H + w["forget_bias"]))
        after: dict[str, list[Tensor]] = {name: [] for name in now}
        y = []
        for h in range(H):
            m_before = now["log_scale"][h]
            m = torch.maximum(torch.log(forget[h]) + m_before, log_input[h])
            keep, take = forget[h] * torch.exp(m_before - m), torch.exp(log_input[h] - m)
            memory_EP = keep * now["memory"][h] + take * torch.outer(k[h], v[h])
            keys_E = keep * now["keys"][h] + take * k[h]
            y_P = q[h] @ memory_EP / (torch.maximum((q[h] @ keys_E).abs(), torch.exp(-m)) + f.divisor_eps)
            y_P = y_P - y_P.mean()
            y.append(y_P / torch.sqrt((y_P * y_P).mean() + f.norm_eps))
            for name, value in ("memory", memory_EP), ("keys", keys_E), ("log_scale", m):
                after[name].append(value)
        y_I = torch.cat(y) * w["head_norm.weight"] * torch.sigmoid(o)
        return w["out_proj.weight"] @ y_I, {name: torch.stack(values) for name, values in after.items()}

    shapes = {"memory": (H, E, P), "keys": (H, E), "log_scale": (H,)}
    return token_by_token(step, shapes, x_BTD, tokens, state, d_model=dims.d_model)
