"""Mamba-2 in torch: the module, and the pure-torch definition of each of its slots.

Dao and Gu, arXiv:2405.21060, algorithm of section 6; results match mamba_ssm and Hugging Face's
Mamba2Mixer. Letters: B batch, T time, D d_model, H heads, P head_dim, I = H * P d_inner, N d_state,
G groups, R = H / G heads of a group, K = R * P their channels, C channels of the convolution,
S = G * N, E channels of in_proj, c chunks, Q tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.chunks import LONGEST_CHUNK, LOWEST_LOG_DECAY, in_chunks, masks, running_sums
from mambadsl.kinds.conv import causal_conv
from mambadsl.kinds.gate_norm import gate_norm
from mambadsl.kinds.mamba2.kind import KIND, in_segments
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows, starts
from mambadsl.kinds.tokens import Tokens


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
    return layer.parts["gate_norm"](
        y_BTHP.flatten(-2), z_BTI, None if f.gated_norm == "none" else layer.gate_norm.weight,
        order=f.gated_norm, groups=f.norm_groups, eps=f.norm_eps,
    )


def step_sizes(dt_BTH: Tensor, dt_bias_H: Tensor, *, limit: tuple[float, float | None]) -> Tensor:
    """softplus(dt + dt_bias) within `limit` (None: no upper limit), in float32. [B, T, H]"""
    dt_BTH = F.softplus(dt_BTH.float() + dt_bias_H.float())
    low, high = limit
    return dt_BTH if low == 0 and high is None else dt_BTH.clamp(low, high)


def ssd(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, *, chunk: int,
    segments_BT: Tensor | None = None, state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan: for each head h, of group g,

        S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_t,g^T        y_t = S_t C_t,g + D_h x_t

    S starts from `state_BHPN` (zeros where None), and from zeros at every later document of a row.
    dt: float32, at least 0, and 0 at padding (the state stays as it is). Returns y_BTHP in the dtype of
    x, and the state after the last token, float32. Linear in T: matrix products inside chunks, a loop
    over chunks for the states.
    """
    (B, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
    R, Q = H // G, min(chunk, T, LONGEST_CHUNK)
    x_BTHP, dtype = x_BTHP.float(), x_BTHP.dtype

    document_BcQ = None if segments_BT is None else in_chunks(starts(segments_BT), Q).cumsum(2)
    sees_BcQQ, whole_BcQ, last_BcQ = masks(document_BcQ, Q, x_BTHP.device)
    log_decay_BcQH = in_chunks((dt_BTH * A_H).clamp_min(LOWEST_LOG_DECAY), Q)
    log_decay_BcHQ = running_sums(log_decay_BcQH, document_BcQ).transpose(2, 3)
    x_BcQHP = in_chunks(x_BTHP * dt_BTH[..., None], Q)
    B_BcGQN = in_chunks(B_BTGN.float(), Q).transpose(2, 3)
    C_BcGQN = in_chunks(C_BTGN.float(), Q).transpose(2, 3)
    total_BcH1 = log_decay_BcHQ[..., -1:]

    # Inside a chunk: y_i = sum over j <= i of (C_i . B_j) exp(log decay from j to i) dt_j x_j. Where j > i
    # the exponent would be positive: there it is clamped and the score is 0, and so is the gradient.
    score_BcGQQ = (C_BcGQN @ B_BcGQN.transpose(-1, -2)) * sees_BcQQ[:, :, None]
    decay_BcHQQ = (log_decay_BcHQ[..., :, None] - log_decay_BcHQ[..., None, :]).clamp_max(0).exp()
    weight_BcHQQ = (score_BcGQQ[:, :, :, None] * decay_BcHQQ.unflatten(2, (G, R))).flatten(2, 3)
    y_BcQHP = (weight_BcHQQ @ x_BcQHP.transpose(2, 3)).transpose(2, 3)

    # What each chunk adds to the state at its end; heads of a group are columns of one product.
    to_end_BcHQ = (total_BcH1 - log_decay_BcHQ).clamp_max(0).exp()
    to_end_BcHQ = to_end_BcHQ if last_BcQ is None else to_end_BcHQ * last_BcQ[:, :, None]
    late_BcQHP = x_BcQHP * to_end_BcHQ.transpose(2, 3)[..., None]
    late_BcGQK = late_BcQHP.unflatten(3, (G, R)).flatten(4).transpose(2, 3)
    added_BcGNK = B_BcGQN.transpose(-1, -2) @ late_BcGQK

    # From chunk to chunk.
    from_start_BcHQ = log_decay_BcHQ.exp()
    from_start_BcHQ = from_start_BcHQ if whole_BcQ is None else from_start_BcHQ * whole_BcQ[:, :, None]
    kept_BcHP = from_start_BcHQ[..., -1:].expand(-1, -1, -1, P)
    kept_BcG1K = kept_BcHP.unflatten(2, (G, R)).flatten(3)[:, :, :, None]
    if state_BHPN is None:
        state_BGNK = torch.zeros_like(added_BcGNK[:, 0])
    else:
        state_BGNK = state_BHPN.float().unflatten(1, (G, R)).flatten(2, 3).transpose(2, 3)
    before = []
    for kept_BG1K, added_BGNK in zip(kept_BcG1K.unbind(1), added_BcGNK.unbind(1)):
        before.append(state_BGNK)
        state_BGNK = torch.addcmul(added_BGNK, kept_BG1K, state_BGNK)

    # What each token reads of the state before its chunk.
    read_BcQHP = (C_BcGQN @ torch.stack(before, 1)).transpose(2, 3).reshape(y_BcQHP.shape)
    y_BcQHP = torch.addcmul(y_BcQHP, read_BcQHP, from_start_BcHQ.transpose(2, 3)[..., None])
    y_BTHP = torch.addcmul(y_BcQHP.flatten(1, 2)[:, :T], x_BTHP, D_H.float()[:, None])
    return y_BTHP.to(dtype), state_BGNK.transpose(2, 3).reshape(B, H, P, N)


class Module(KindModule):
    """Mamba-2. Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; the others as in this file."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {
        "in_proj": F.linear, "conv": causal_conv, "scan": ssd, "gate_norm": gate_norm, "out_proj": F.linear,
        "core": core,
    }

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
