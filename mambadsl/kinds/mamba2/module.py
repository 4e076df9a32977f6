"""Mamba-2 in torch: the module, and the pure-torch definition of each of its slots.

Dao and Gu, arXiv:2405.21060; results match mamba_ssm and Hugging Face's Mamba2Mixer. Letters: B batch, T time,
D d_model, H heads, P head_dim, I = H * P d_inner, N d_state, G groups, C channels of the convolution, S = G * N,
E channels of in_proj.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.conv import causal_conv
from mambadsl.kinds.gate_norm import gate_norm
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.mamba2.kind import KIND, in_segments
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.ssd import ssd
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


def core(layer: Module, zxbcdt_BTE: Tensor, rows: Rows, state: dict[str, Any] | None) -> Tensor:
    """From in_proj's output [z | x | B | C | dt] to out_proj's input [B, T, I]; reads and writes `state`."""
    f = layer.f
    z_BTI, xbc_BTC, dt_BTH = zxbcdt_BTE.split([f.heads * f.head_dim, layer.conv.weight.shape[0], f.heads], -1)
    xbc_BTC, conv_state = layer.convolve(xbc_BTC, rows, state)
    x_BTI, B_BTS, C_BTS = xbc_BTC.split([size for _, size in in_segments(f)[1:4]], -1)
    y_BTHP, ssm_state = layer.parts["scan"](
        x_BTI.unflatten(-1, (f.heads, f.head_dim)),
        rows.without_padding(step_sizes(dt_BTH, layer.dt_bias, limit=f.dt_limit)),
        -layer.A_log.float().exp(),
        B_BTS.unflatten(-1, (f.groups, f.d_state)),
        C_BTS.unflatten(-1, (f.groups, f.d_state)),
        layer.D,
        chunk=f.chunk, segments_BT=rows.segments_BT, state_BHPN=rows.past(state, "ssm"),
    )
    rows.keep(state, conv=conv_state, ssm=ssm_state)
    how = dict(order=f.gated_norm, groups=layer.norm_groups, eps=f.norm_eps)
    if layer.norm_ranks > 1 and layer.averaged:
        how["averaged"] = partial(layer.averaged, among=layer.norm_ranks)
    weight_I = None if f.gated_norm == "none" else layer.gate_norm.weight
    return layer.parts["gate_norm"](y_BTHP.flatten(-2), z_BTI, weight_I, **how)


def step_sizes(dt_BTH: Tensor, dt_bias_H: Tensor, *, limit: tuple[float, float | None]) -> Tensor:
    """softplus(dt + dt_bias) within `limit` (None: no upper limit), in float32. [B, T, H]"""
    dt_BTH = F.softplus(dt_BTH.float() + dt_bias_H.float())
    low, high = limit
    return dt_BTH if low == 0 and high is None else dt_BTH.clamp(low, high)


class Module(KindModule):
    """Mamba-2. Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; the others as in this file."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {
        "in_proj": F.linear, "conv": causal_conv, "scan": ssd, "gate_norm": gate_norm, "out_proj": F.linear,
        "core": core,
    }

    def __init__(self, f: Values, dims: Dims, **made: Any):
        super().__init__(f, dims, **made)
        #: Groups of the norm that there are channels of, and how many ranks have channels of each. (torch.compile knows
        #: no fractions.)
        self.norm_groups, self.norm_ranks = f.norm_groups.as_integer_ratio()

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        rows = Rows.of(tokens, state)
        zxbcdt_BTE = self.enter(rows.pack(x_BTD), self.in_proj, norm)
        zxbcdt_BTE = self._scaled(zxbcdt_BTE)
        y_BTI = self.parts["core"](self, zxbcdt_BTE, rows, state)
        return rows.unpack(self.parts["out_proj"](y_BTI, self.out_proj.weight, self.out_proj.bias))

    def _scaled(self, zxbcdt_BTE: Tensor) -> Tensor:
        scales = self.f.proj_multipliers
        if all(scale == 1 for scale in scales):
            return zxbcdt_BTE
        sizes = [size for _, size in in_segments(self.f)]
        return zxbcdt_BTE * torch.cat([zxbcdt_BTE.new_full((n,), s) for n, s in zip(sizes, scales)])
