"""Gated DeltaNet in torch: the module, and the pure-torch definition of its scan.

Yang, Kautz and Hatamizadeh, arXiv:2412.06464; results match Hugging Face's Qwen3NextGatedDeltaNet and
OlmoHybridGatedDeltaNet. Letters: B batch, T time, D d_model, H heads, K key_heads, E key_dim, P value_dim, I = H * P,
C channels of the convolution, c chunks, Q tokens of a chunk.
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
from mambadsl.kinds.gated_delta_net.kind import KIND, conv_dim, in_segments, v_dim
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.tokens import Tokens


def gated_delta_rule(
    q_BTKE: Tensor, k_BTKE: Tensor, v_BTHP: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, *, chunk: int,
    eps: float, segments_BT: Tensor | None = None, state_BHEP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan: for each head h the delta rule of `kinds/delta_rule.py`, with q and k of key head h // (H / K), each of
    length 1 (eps: added to the squared length), and q divided by sqrt(E). Returns y_BTHP in the dtype of v, and the
    state after the last token, float32.
    """
    (_, T, H, _), (K, E) = v_BTHP.shape, q_BTKE.shape[2:]
    q_BTHE, k_BTHE = (unit(t, eps).repeat_interleave(H // K, 2) for t in (q_BTKE, k_BTKE))
    return delta_rule(
        q_BTHE * E**-0.5, k_BTHE, v_BTHP, log_decay_BTH[..., None], beta_BTH, pairs=_pairs,
        Q=min(chunk, T, LONGEST_CHUNK), segments_BT=segments_BT, state_BHEP=state_BHEP,
    )


def _pairs(q_BcHQE: Tensor, k_BcHQE: Tensor, sums_BcHQ1: Tensor, sees_Bc1QQ: Tensor) -> tuple[Tensor, Tensor]:
    """As `delta_rule.Pairs`. Where j > i the exponent would be positive: there it is clamped and the pair counts 0."""
    decay_BcHQQ = decay(sums_BcHQ1 - sums_BcHQ1.transpose(-1, -2)) * sees_Bc1QQ
    keys_BcHEQ = k_BcHQE.transpose(-1, -2)
    return (q_BcHQE @ keys_BcHEQ) * decay_BcHQQ, (k_BcHQE @ keys_BcHEQ) * decay_BcHQQ


class Module(KindModule):
    """Gated DeltaNet. Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; conv as `causal_conv`; scan as in
    this file; gate_norm as `gate_norm`, with the weight of one head for each."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {
        "in_proj": F.linear, "conv": causal_conv, "scan": gated_delta_rule, "gate_norm": gate_norm,
        "out_proj": F.linear,
    }

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f, rows = self.f, Rows.of(tokens, state)
        projected = self.enter(rows.pack(x_BTD), self.in_proj, norm)
        qkv_BTC, z_BTI, b_BTH, a_BTH = projected.split([conv_dim(f), v_dim(f), f.heads, f.heads], -1)
        qkv_BTC, conv_state = self.convolve(qkv_BTC, rows, state)
        q, k, v = qkv_BTC.split([size for _, size in in_segments(f)[:3]], -1)
        y_BTHP, delta = self.parts["scan"](
            q.unflatten(-1, (f.key_heads, f.key_dim)), k.unflatten(-1, (f.key_heads, f.key_dim)),
            v.unflatten(-1, (f.heads, f.value_dim)), *self._rates(b_BTH, a_BTH, rows),
            chunk=f.chunk, eps=f.qk_eps, segments_BT=rows.segments_BT, state_BHEP=rows.past(state, "delta"),
        )
        rows.keep(state, conv=conv_state, delta=delta)
        y_BTI = self.parts["gate_norm"](
            y_BTHP.flatten(-2), z_BTI, self.gate_norm.weight.repeat(f.heads), order="before_gate", groups=f.heads,
            eps=f.norm_eps,
        )
        return rows.unpack(self.parts["out_proj"](y_BTI, self.out_proj.weight, self.out_proj.bias))

    def _rates(self, b_BTH: Tensor, a_BTH: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Log decays and betas, float32, 0 at padding."""
        beta_BTH = torch.sigmoid(b_BTH.float()) * (2 if self.f.negative_eigenvalues else 1)
        log_decay_BTH = -self.A_log.float().exp() * F.softplus(a_BTH.float() + self.dt_bias.float())
        return rows.without_padding(log_decay_BTH), rows.without_padding(beta_BTH)
