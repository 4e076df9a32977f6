"""Griffin's recurrent block, slow and obvious: row by row, token by token. The definition that the module and every
kernel are held to; it shares no code with them.

Letters: D d_model, I d_inner, J d_conv - 1 earlier inputs, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.activations import ACTIVATIONS
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.recurrence import token_by_token
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens,
    state: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """weights: by the names of the kind's table. state: {"conv" [B, I, J], "lru" [B, I]} and, where it is not 0,
    "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    shapes = {"conv": (f.d_inner, f.d_conv - 1), "lru": (f.d_inner,)}

    def gate(name: str, c_I: Tensor) -> Tensor:
        blocks = zip(w[f"{name}.weight"], c_I.chunk(f.blocks))
        return torch.sigmoid(torch.cat([block @ part for block, part in blocks]) + w[f"{name}.bias"])

    def step(given: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x_D, position = given[:-1], given[-1]
        x_I, y_I = (w["in_proj.weight"] @ x_D + w.get("in_proj.bias", 0)).split(f.d_inner)
        window_IK = torch.cat([now["conv"], x_I[:, None]], dim=1)
        c_I = (window_IK * w["conv.weight"]).sum(1) + w.get("conv.bias", 0)
        a_I = torch.exp(-f.sharpness * gate("decay_gate", c_I) * F.softplus(w["a_param"]))
        share_I = torch.ones_like(a_I) if position == 0 else torch.sqrt(1 - a_I**2)
        h_I = a_I * now["lru"] + share_I * gate("input_gate", c_I) * c_I
        out_D = w["out_proj.weight"] @ (h_I * ACTIVATIONS[f.act](y_I)) + w.get("out_proj.bias", 0)
        return out_D, {"conv": window_IK[:, 1:], "lru": h_I}

    # The step is told each token's position beside what the token is.
    positions_BT1 = tokens.positions_BT[..., None].expand(*x_BTD.shape[:2], 1).to(x_BTD.dtype)
    given = torch.cat([x_BTD, positions_BT1], -1)
    return token_by_token(step, shapes, given, tokens, state, d_model=dims.d_model)
