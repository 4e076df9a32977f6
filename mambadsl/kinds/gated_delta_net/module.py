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

from mambadsl.kinds.chunks import LONGEST_CHUNK, LOWEST_LOG_DECAY, in_chunks, masks, running_sums
from mambadsl.kinds.conv import causal_conv
from mambadsl.kinds.gate_norm import gate_norm
from mambadsl.kinds.gated_delta_net.kind import KIND, conv_dim, in_segments, v_dim
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows, starts
from mambadsl.kinds.tokens import Tokens


def gated_delta_rule(
    q_BTKE: Tensor, k_BTKE: Tensor, v_BTHP: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, *, chunk: int,
    eps: float, segments_BT: Tensor | None = None, state_BHEP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan: for each head h, with q and k of key head h // (H / K), each of length 1 (eps: added to the squared
    length), and q divided by sqrt(E),

        S = exp(log_decay_t) S_{t-1}        S_t = S + k_t beta_t (v_t - k_t S)        y_t = q_t S_t

    S starts from `state_BHEP` (zeros where None), and from zeros at every later document of a row. log_decay: at most
    0; both 0 at padding (the state stays as it is). Returns y_BTHP in the dtype of v, and the state after the last
    token, float32. Linear in T: in a chunk the corrections beta (v - k S) of all tokens are the solution of one
    triangular system (section 3.3 of the paper), and a loop over chunks carries the state.
    """
    (B, T, H, P), E = v_BTHP.shape, q_BTKE.shape[3]
    Q = min(chunk, T, LONGEST_CHUNK)

    def of_heads(t_BTKE: Tensor) -> Tensor:
        t_BTKE = t_BTKE.float()
        t_BTKE = t_BTKE * torch.rsqrt(t_BTKE.square().sum(-1, keepdim=True) + eps)
        return in_chunks(t_BTKE.repeat_interleave(H // t_BTKE.shape[2], 2), Q).transpose(2, 3)

    document_BcQ = None if segments_BT is None else in_chunks(starts(segments_BT), Q).cumsum(2)
    sees_BcQQ, whole_BcQ, last_BcQ = masks(document_BcQ, Q, v_BTHP.device)
    log_decay_BcQH = in_chunks(log_decay_BTH.float().clamp_min(LOWEST_LOG_DECAY), Q)
    log_decay_BcHQ = running_sums(log_decay_BcQH, document_BcQ).transpose(2, 3)
    q_BcHQE, k_BcHQE = of_heads(q_BTKE) * E**-0.5, of_heads(k_BTKE)
    v_BcHQP = in_chunks(v_BTHP.float(), Q).transpose(2, 3)
    beta_BcHQ1 = in_chunks(beta_BTH.float(), Q).transpose(2, 3)[..., None]

    # Of pairs in a chunk; where j > i the exponent would be positive: there it is clamped and the pair counts 0.
    decay_BcHQQ = (log_decay_BcHQ[..., :, None] - log_decay_BcHQ[..., None, :]).clamp_max(0).exp()
    decay_BcHQQ = decay_BcHQQ * sees_BcQQ[:, :, None]
    score_BcHQQ = (q_BcHQE @ k_BcHQE.transpose(-1, -2)) * decay_BcHQQ
    system_BcHQQ = (k_BcHQE @ k_BcHQE.transpose(-1, -2)) * decay_BcHQQ * beta_BcHQ1

    from_start_BcHQ = log_decay_BcHQ.exp()
    to_end_BcHQ = (log_decay_BcHQ[..., -1:] - log_decay_BcHQ).clamp_max(0).exp()
    if document_BcQ is not None:
        from_start_BcHQ, to_end_BcHQ = from_start_BcHQ * whole_BcQ[:, :, None], to_end_BcHQ * last_BcQ[:, :, None]
    # The corrections without a state before the chunk, and what of them each number of that state takes away.
    given_BcHQX = torch.cat((v_BcHQP, k_BcHQE * from_start_BcHQ[..., None]), -1) * beta_BcHQ1
    solved_BcHQX = torch.linalg.solve_triangular(
        system_BcHQQ.tril(-1), given_BcHQX, upper=False, unitriangular=True
    )
    alone_BcHQP, taken_BcHQE = solved_BcHQX.split([P, E], -1)
    reads_BcHQE, writes_BcHQE = q_BcHQE * from_start_BcHQ[..., None], k_BcHQE * to_end_BcHQ[..., None]
    kept_BcH11 = from_start_BcHQ[..., -1:, None]

    state_BHEP = v_BcHQP.new_zeros(B, H, E, P) if state_BHEP is None else state_BHEP.float()
    ys = []
    for alone, taken, score, reads, writes, kept in zip(
        *(t.unbind(1) for t in (alone_BcHQP, taken_BcHQE, score_BcHQQ, reads_BcHQE, writes_BcHQE, kept_BcH11))
    ):
        new_BHQP = alone - taken @ state_BHEP
        ys.append(reads @ state_BHEP + score @ new_BHQP)
        state_BHEP = kept * state_BHEP + writes.transpose(-1, -2) @ new_BHQP
    y_BTHP = torch.stack(ys, 1).transpose(2, 3).flatten(1, 2)[:, :T]
    return y_BTHP.to(v_BTHP.dtype), state_BHEP


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
