"""Mamba-1, slow and obvious: row by row, token by token. The definition that the module and every
kernel are held to; it shares no code with them.

Letters: D d_model, I d_inner, N d_state, K taps of the convolution, J = K - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import PADDING, Tokens
from mambadsl.kinds.values import Values


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens,
    state: Mapping[str, Any] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """weights: by the names of the kind's table. state: {"conv" [B, I, K-1], "ssm" [B, I, N]} and, where it
    is not 0, "segment" [B]. Returns y_BTD (zeros at padding) and the state after it. All in float32."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    B, T, _ = x_BTD.shape
    zeros = x_BTD.float().new_zeros
    segments_BT = zeros(B, T) if tokens.segments_BT is None else tokens.segments_BT
    outputs, after = [], []
    for b in range(B):
        if state is None:
            conv_IJ, ssm_IN = zeros(f.d_inner, f.d_conv - 1), zeros(f.d_inner, f.d_state)
            document = 0
        else:
            conv_IJ, ssm_IN = state["conv"][b].float(), state["ssm"][b].float()
            document = int(state["segment"][b]) if "segment" in state else 0
        row = []
        for t in range(T):
            segment = int(segments_BT[b, t])
            if segment == PADDING:
                row.append(zeros(dims.d_model))
                continue
            if segment != document:
                conv_IJ, ssm_IN, document = torch.zeros_like(conv_IJ), torch.zeros_like(ssm_IN), segment
            y_D, conv_IJ, ssm_IN = one_token(w, f, x_BTD[b, t].float(), conv_IJ, ssm_IN)
            row.append(y_D)
        outputs.append(torch.stack(row))
        after.append((conv_IJ, ssm_IN, zeros((), dtype=torch.int32) + document))
    conv, ssm, segment = (torch.stack(tensors) for tensors in zip(*after))
    return torch.stack(outputs).to(x_BTD.dtype), {"conv": conv, "ssm": ssm, "segment": segment}


def one_token(
    w: Mapping[str, Tensor], f: Values, x_D: Tensor, conv_IJ: Tensor, ssm_IN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x_I, z_I = (w["in_proj.weight"] @ x_D + w.get("in_proj.bias", 0)).chunk(2)
    window_IK = torch.cat([conv_IJ, x_I[:, None]], dim=1)
    x_I = F.silu((window_IK * w["conv.weight"]).sum(1) + w.get("conv.bias", 0))

    low_R, B_N, C_N = (w["x_proj.weight"] @ x_I).split([f.dt_rank, f.d_state, f.d_state])
    if f.dt_bc_norm.name != "none":
        low_R, B_N, C_N = (
            v / torch.sqrt((v**2).mean() + f.dt_bc_norm.eps) * w.get(f"{name}_norm.weight", 1)
            for name, v in (("dt", low_R), ("b", B_N), ("c", C_N))
        )
    dt_I = F.softplus(w["dt_proj.weight"] @ low_R + w["dt_proj.bias"])
    A_IN = -w["A_log"].exp()

    ssm_IN = torch.exp(dt_I[:, None] * A_IN) * ssm_IN + torch.outer(dt_I * x_I, B_N)
    y_I = (ssm_IN @ C_N + w["D"] * x_I) * F.silu(z_I)
    return w["out_proj.weight"] @ y_I + w.get("out_proj.bias", 0), window_IK[:, 1:], ssm_IN
