"""Mamba-1, slow and obvious: row by row, token by token. The definition that the module and every
kernel are held to; it shares no code with them.

Letters: D d_model, I d_inner, P channels of one head, N d_state, R dt_rank, E what x_proj gives for a head, K taps
of the convolution, J = K - 1.
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
    """weights: by the names of the kind's table. state: {"conv" [B, I, K-1], "ssm" [B, I, N]} and, where it
    is not 0, "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    shapes = {"conv": (f.d_inner, f.d_conv - 1), "ssm": (f.d_inner, f.d_state)}

    def step(x_D: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y_D, conv, ssm = one_token(w, f, x_D, now["conv"], now["ssm"])
        return y_D, {"conv": conv, "ssm": ssm}

    return token_by_token(step, shapes, x_BTD, tokens, state, d_model=dims.d_model)


def one_token(
    w: Mapping[str, Tensor], f: Values, x_D: Tensor, conv_IJ: Tensor, ssm_IN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x_I, z_I = (w["in_proj.weight"] @ x_D + w.get("in_proj.bias", 0)).chunk(2)
    window_IK = torch.cat([conv_IJ, x_I[:, None]], dim=1)
    x_I = F.silu((window_IK * w["conv.weight"]).sum(1) + w.get("conv.bias", 0))

    y, after = [], []
    P = f.d_inner // f.heads
    for h in range(f.heads):
        mine = slice(h * P, (h + 1) * P)
        x_P, E = x_I[mine], f.dt_rank + 2 * f.d_state
        low_R, B_N, C_N = (w["x_proj.weight"][h * E : (h + 1) * E] @ x_P).split([f.dt_rank, f.d_state, f.d_state])
        if f.dt_bc_norm.name != "none":
            low_R, B_N, C_N = (
                v / torch.sqrt((v**2).mean() + f.dt_bc_norm.eps) * w.get(f"{name}_norm.weight", 1)
                for name, v in (("dt", low_R), ("b", B_N), ("c", C_N))
            )
        dt_P = F.softplus(w["dt_proj.weight"][mine] @ low_R + w["dt_proj.bias"][mine])
        A_PN = -w["A_log"][mine].exp()
        ssm_PN = torch.exp(dt_P[:, None] * A_PN) * ssm_IN[mine] + torch.outer(dt_P * x_P, B_N)
        y.append(ssm_PN @ C_N + w["D"][mine] * x_P)
        after.append(ssm_PN)
    y_I, ssm_IN = torch.cat(y) * F.silu(z_I), torch.cat(after)
    return w["out_proj.weight"] @ y_I + w.get("out_proj.bias", 0), window_IK[:, 1:], ssm_IN
