"""mLSTM in torch: the module, and the pure-torch definition of its scan.

Beck and others, arXiv:2405.04517; chunks after Beck and others, arXiv:2503.14376; results match Hugging Face's
xLSTMLayer. Letters: B batch, T time, D d_model, H heads, E key_dim, P value_dim, I = H * P, c chunks, Q tokens of a
chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.chunks import LONGEST_CHUNK, in_chunks, masks, running_sums
from mambadsl.kinds.mlstm.kind import KIND, in_segments
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.norm import layer_norm
from mambadsl.kinds.rows import Rows, starts
from mambadsl.kinds.tokens import Tokens

#: The logarithm of nothing: exp of it is 0 beside any other, and differences of two are finite.
NOTHING = -1e30
#: exp(80) is near the largest float32: nothing that is divided by it is seen.
HIGHEST_LOG = 80.0

#: memory_BHEP, keys_BHE, log_scale_BH.
Memory = tuple[Tensor, Tensor, Tensor]


def matrix_memory(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHP: Tensor, log_input_BTH: Tensor, log_forget_BTH: Tensor, *, chunk: int,
    eps: float, segments_BT: Tensor | None = None, past: Memory | None = None,
) -> tuple[Tensor, Memory]:
    """The scan: for each head, with C, n and m from `past` (zeros where None, and at every later document of a row),

        m_t = max(log f_t + m_{t-1}, log i_t)       f = exp(log f_t + m_{t-1} - m_t)        i = exp(log i_t - m_t)
        C_t = f C_{t-1} + i k_t v_t^T               n_t = f n_{t-1} + i k_t
        y_t = q_t C_t / (max(|q_t . n_t|, exp(-m_t)) + eps)          with q divided by sqrt(E)

    Gates are float32; at padding log i is NOTHING and log f is 0 (the state stays as it is). Returns y_BTHP in the
    dtype of v, and the state after the last token, float32. n is one more column of C, what values of 1 would add.
    """
    (_, T, _, P), E, dtype = v_BTHP.shape, q_BTHE.shape[-1], v_BTHP.dtype
    Q = min(chunk, T, LONGEST_CHUNK)
    v_BTHP = F.pad(v_BTHP.float(), (0, 1), value=1)
    q_BcHQE, k_BcHQE, v_BcHQP = (in_chunks(t.float(), Q).transpose(2, 3) for t in (q_BTHE, k_BTHE, v_BTHP))
    q_BcHQE = q_BcHQE * E**-0.5
    document_BcQ = None if segments_BT is None else in_chunks(starts(segments_BT), Q).cumsum(2)
    sees_BcQQ, whole_BcQ, last_BcQ = masks(document_BcQ, Q, q_BTHE.device)
    forgot_BcHQ = running_sums(in_chunks(log_forget_BTH, Q), document_BcQ).transpose(2, 3)
    # Zeros after the last token would be tokens.
    after = -T % Q
    log_input_BcHQ = in_chunks(F.pad(log_input_BTH, (0, 0, 0, after), value=NOTHING), Q).transpose(2, 3)

    # Inside a chunk: how much token i sees of token j, before any scaling; and the largest of it.
    log_seen_BcHQQ = forgot_BcHQ[..., :, None] - forgot_BcHQ[..., None, :] + log_input_BcHQ[..., None, :]
    log_seen_BcHQQ = log_seen_BcHQQ.masked_fill(sees_BcQQ[:, :, None] == 0, NOTHING)
    highest_BcHQ = log_seen_BcHQQ.amax(-1)
    # Of the last document to the chunk's end.
    log_late_BcHQ = log_seen_BcHQQ[..., -1, :]
    whole_BcHQ = torch.ones_like(forgot_BcHQ) if whole_BcQ is None else whole_BcQ[:, :, None].expand_as(forgot_BcHQ)

    # From chunk to chunk.
    if past is None:
        memory_BHEP = torch.zeros(*q_BcHQE[:, 0, :, 0].shape, P + 1, device=q_BTHE.device)
        log_scale_BH = torch.zeros_like(forgot_BcHQ[:, 0, :, 0])
    else:
        memory_BHEP = torch.cat([past[0].float(), past[1].float()[..., None]], -1)
        log_scale_BH = past[2].float()
    before, scales = [], []
    for c in range(q_BcHQE.shape[1]):
        before.append(memory_BHEP)
        scales.append(log_scale_BH)
        whole_BH = whole_BcHQ[:, c, :, -1]
        log_kept_BH = forgot_BcHQ[:, c, :, -1] + log_scale_BH * whole_BH
        log_scale_BH = torch.maximum(log_kept_BH, highest_BcHQ[:, c, :, -1])
        kept_BH = (log_kept_BH - log_scale_BH).exp() * whole_BH
        late_BHQ = (log_late_BcHQ[:, c] - log_scale_BH[..., None]).exp()
        added_BHEP = (k_BcHQE[:, c] * late_BHQ[..., None]).mT @ v_BcHQP[:, c]
        memory_BHEP = torch.addcmul(added_BHEP, memory_BHEP, kept_BH[..., None, None])

    # What each token reads: of its own chunk, and of the memory before it.
    log_from_start_BcHQ = forgot_BcHQ + torch.stack(scales, 1)[..., None] * whole_BcHQ
    m_BcHQ = torch.maximum(log_from_start_BcHQ, highest_BcHQ)
    score_BcHQQ = (q_BcHQE @ k_BcHQE.mT) * (log_seen_BcHQQ - m_BcHQ[..., None]).exp()
    from_start_BcHQ = (log_from_start_BcHQ - m_BcHQ).exp() * whole_BcHQ
    read_BcHQP = torch.addcmul(score_BcHQQ @ v_BcHQP, q_BcHQE @ torch.stack(before, 1), from_start_BcHQ[..., None])
    y_BcHQP, sum_BcHQ1 = read_BcHQP.split([P, 1], -1)
    least_BcHQ1 = (-m_BcHQ).clamp_max(HIGHEST_LOG).exp()[..., None]
    y_BcHQP = y_BcHQP / (torch.maximum(sum_BcHQ1.abs(), least_BcHQ1) + eps)
    y_BTHP = y_BcHQP.transpose(2, 3).flatten(1, 2)[:, :T].to(dtype)
    memory_BHEP, keys_BHE1 = memory_BHEP.split([P, 1], -1)
    return y_BTHP, (memory_BHEP, keys_BHE1[..., 0], log_scale_BH)


def head_norm(y_BTHP: Tensor, o_BTI: Tensor, weight_I: Tensor, *, eps: float) -> Tensor:
    """Layer norm of each head, scaled, times sigmoid(o); float32 inside, [B, T, I] in the dtype of y."""
    normed_BTI = layer_norm(y_BTHP.float(), None, None, eps=eps).flatten(-2) * weight_I.float()
    return (normed_BTI * torch.sigmoid(o_BTI.float())).to(y_BTHP.dtype)


class Module(KindModule):
    """Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; scan and head_norm as in this file."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {"in_proj": F.linear, "scan": matrix_memory, "head_norm": head_norm, "out_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f, rows = self.f, Rows.of(tokens, state)
        projected = self.enter(rows.pack(x_BTD), self.in_proj, norm)
        q, k, v, o_BTI, i_BTH, f_BTH = projected.split([size for _, size in in_segments(f)], -1)
        names = "memory", "keys", "log_scale"
        y_BTHP, after = self.parts["scan"](
            q.unflatten(-1, (f.heads, -1)), k.unflatten(-1, (f.heads, -1)), v.unflatten(-1, (f.heads, -1)),
            *self._gates(i_BTH, f_BTH, rows), chunk=f.chunk, eps=f.divisor_eps, segments_BT=rows.segments_BT,
            past=None if state is None else tuple(rows.past(state, name) for name in names),
        )
        rows.keep(state, **dict(zip(names, after)))
        y_BTI = self.parts["head_norm"](y_BTHP, o_BTI, self.head_norm.weight, eps=f.norm_eps)
        return rows.unpack(self.parts["out_proj"](y_BTI, self.out_proj.weight, self.out_proj.bias))

    def _gates(self, i_BTH: Tensor, f_BTH: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Logarithms of input and forget gates, float32; at padding nothing comes in, nothing is forgotten."""
        i_BTH, f_BTH = i_BTH.float() + self.input_bias.float(), f_BTH.float() + self.forget_bias.float()
        if (cap := self.f.gate_softcap) is not None:
            i_BTH, f_BTH = (cap * torch.tanh(t / cap) for t in (i_BTH, f_BTH))
        real_BTH = rows.without_padding(torch.ones_like(i_BTH))
        return torch.where(real_BTH == 1, i_BTH, NOTHING), rows.without_padding(F.logsigmoid(f_BTH))
