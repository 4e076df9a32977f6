"""Kimi Delta Attention in torch: the module, and the pure-torch definition of its scan.

Kimi Team, arXiv:2510.26692; results match Hugging Face's KimiLinearDeltaAttention and BailingHybridDeltaAttention.
Letters: B batch, T time, D d_model, H heads, E key_dim, P value_dim, I = H * P, C channels of the convolution,
c chunks, Q tokens of a chunk, N spans of a chunk, S tokens of a span.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.chunks import LONGEST_CHUNK, decay
from mambadsl.kinds.conv import causal_conv
from mambadsl.kinds.delta_rule import delta_rule, unit
from mambadsl.kinds.gate_norm import gate_norm
from mambadsl.kinds.kimi_delta.kind import KIND, conv_dim, in_segments
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.tokens import Tokens


def kimi_delta_rule(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHP: Tensor, log_decay_BTHE: Tensor, beta_BTH: Tensor, *, chunk: int,
    eps: float, segments_BT: Tensor | None = None, state_BHEP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan: the delta rule of `kinds/delta_rule.py` with a decay for each row of the state, and q and k of length 1
    (eps: added to the squared length), q divided by sqrt(E). Returns y_BTHP in the dtype of v, and the state after
    the last token, float32.
    """
    (_, T), E = v_BTHP.shape[:2], q_BTHE.shape[3]
    most = min(chunk, T, LONGEST_CHUNK)
    return delta_rule(
        unit(q_BTHE, eps) * E**-0.5, unit(k_BTHE, eps), v_BTHP, log_decay_BTHE, beta_BTH, pairs=_pairs,
        # A power of two, for `_pairs`.
        Q=1 << (most - 1).bit_length(), segments_BT=segments_BT, state_BHEP=state_BHEP,
    )


def _pairs(q_BcHQE: Tensor, k_BcHQE: Tensor, sums_BcHQE: Tensor, sees_Bc1QQ: Tensor) -> tuple[Tensor, Tensor]:
    """As `delta_rule.Pairs`, with a decay inside each product's sum. Q is a power of two: pairs of tokens are found for
    spans of one, of two, of four; of two neighbouring spans, the later one's tokens read what the earlier one's wrote
    across the boundary between them. Decay up to there and from there on are products of one token each, at most 1."""
    reads_2BcHQE = torch.stack((q_BcHQE, k_BcHQE))
    found = (reads_2BcHQE * k_BcHQE).sum(-1)[..., None, None]
    span = 1
    while span < k_BcHQE.shape[-2]:
        early_k, _ = _halves(k_BcHQE, span)
        _, late_reads = _halves(reads_2BcHQE, span)
        early_sums, late_sums = _halves(sums_BcHQE, span)
        boundary = early_sums[..., -1:, :]
        # Of other documents the exponents may be positive: their pairs count 0.
        writes = early_k * decay(boundary - early_sums)
        across_2BcHNSS = (late_reads * decay(late_sums - boundary)) @ writes.transpose(-1, -2)
        early, late = found.unflatten(-3, (-1, 2)).unbind(-3)
        found = torch.cat(
            (torch.cat((early, torch.zeros_like(early)), -1), torch.cat((across_2BcHNSS, late), -1)), -2
        )
        span *= 2
    return tuple(found.squeeze(-3) * sees_Bc1QQ)


def _halves(t_BcHQE: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Of each two neighbouring spans, the earlier and the later: [B, c, H, N, S, E]."""
    return t_BcHQE.unflatten(-2, (-1, 2, span)).unbind(-3)


class Module(KindModule):
    """Kimi Delta Attention. Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; conv as `causal_conv`; scan as
    in this file; gate_norm as `gate_norm`, with the weight of one head for each."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {
        "in_proj": F.linear, "conv": causal_conv, "scan": kimi_delta_rule, "gate_norm": gate_norm,
        "out_proj": F.linear,
    }

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f, rows = self.f, Rows.of(tokens, state)
        sizes = [size for _, size in in_segments(f)]
        projected = self.enter(rows.pack(x_BTD), self.in_proj, norm)
        qkv_BTC, z_BTI, b_BTH, a_BTX = projected.split([conv_dim(f), *sizes[3:]], -1)
        qkv_BTC, conv_state = self.convolve(qkv_BTC, rows, state)
        q_BTHE, k_BTHE, v_BTHP = (t.unflatten(-1, (f.heads, -1)) for t in qkv_BTC.split(sizes[:3], -1))
        y_BTHP, delta = self.parts["scan"](
            q_BTHE, k_BTHE, v_BTHP, self._log_decay(a_BTX, rows), rows.without_padding(torch.sigmoid(b_BTH.float())),
            chunk=f.chunk, eps=f.qk_eps, segments_BT=rows.segments_BT, state_BHEP=rows.past(state, "delta"),
        )
        rows.keep(state, conv=conv_state, delta=delta)
        if f.gate_rank:
            z_BTI = F.linear(z_BTI, self.gate_proj.weight)
        y_BTI = self.parts["gate_norm"](
            y_BTHP.flatten(-2), z_BTI, self.gate_norm.weight.repeat(f.heads), order="before_gate", groups=f.heads,
            eps=f.norm_eps, gate="sigmoid",
        )
        return rows.unpack(self.parts["out_proj"](y_BTI, self.out_proj.weight, self.out_proj.bias))

    def _log_decay(self, a_BTX: Tensor, rows: Rows) -> Tensor:
        """[B, T, H, E] float32, 0 at padding."""
        f = self.f
        if f.decay_rank:
            a_BTX = F.linear(a_BTX, self.decay_proj.weight)
        a_BTHE = (a_BTX.float() + self.dt_bias.float()).unflatten(-1, (f.heads, -1))
        rate_H1 = self.A_log.float().exp()[:, None]
        if f.decay.name == "bounded":
            log_decay_BTHE = f.decay.lower_bound * torch.sigmoid(rate_H1 * a_BTHE)
        else:
            log_decay_BTHE = -rate_H1 * F.softplus(a_BTHE)
        return rows.without_padding(log_decay_BTHE.flatten(-2)).unflatten(-1, (f.heads, -1))
