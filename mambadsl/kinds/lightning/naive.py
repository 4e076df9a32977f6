"""Lightning attention, slow and obvious: row by row, token by token, head by head. The definition that the module and
every kernel are held to; it shares no code with them.

Letters: D d_model, H heads, P head_dim.
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
    """weights: by the names of the kind's table. state: {"kv" [B, H, P, P]: values by keys} and, where it is not 0,
    "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    H, P = f.heads, f.head_dim

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v, z = (w["in_proj.weight"] @ x_D).chunk(4)
        q, k, v = ((t * torch.sigmoid(t)).view(H, P) for t in (q, k, v))
        states, y = [], []
        for h in range(H):
            states.append(torch.exp(-w["slope"][h]) * now["kv"][h] + torch.outer(v[h], k[h]))
            y.append(states[h] @ q[h])
        y = torch.cat(y)
        y = y / torch.sqrt((y * y).mean() + f.norm_eps) * w["gate_norm.weight"] * torch.sigmoid(z)
        return w["out_proj.weight"] @ y, {"kv": torch.stack(states)}

    return token_by_token(step, {"kv": (H, P, P)}, x_BTD, tokens, state, d_model=dims.d_model)
