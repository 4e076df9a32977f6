"""Mamba-1 in torch: the module, and the pure-torch definition of each of its slots.

Gu and Dao, arXiv:2312.00752; results match mamba_ssm's Mamba and Hugging Face's MambaMixer,
JambaMambaMixer, FalconMambaMixer and ZambaMambaMixer. Letters: B batch, T time, D d_model, I d_inner (in the scan and
`_selection`: the channels of one head), N d_state, c chunks, Q tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambadsl.kinds.conv import causal_conv
from mambadsl.kinds.mamba1.kind import KIND
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.norm import rms_norm
from mambadsl.kinds.rows import Rows, starts
from mambadsl.kinds.tokens import Tokens

#: The scan holds a few tensors of at most this many elements (or of one chunk), whatever the length.
BLOCK_ELEMENTS = 2**24


def selective_scan(
    x_BTI: Tensor, dt_BTI: Tensor, A_IN: Tensor, B_BTN: Tensor, C_BTN: Tensor, D_I: Tensor, *, chunk: int,
    segments_BT: Tensor | None = None, state_BIN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan: for each channel i and state n,

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = sum over n of C_t h_t, + D x_t

    h starts from `state_BIN` (zeros where None), and from zeros at every later document of a row.
    dt: float32, at least 0, and 0 at padding (the state stays as it is). Returns y_BTI in the dtype of
    x, and the state after the last token, float32.

    Linear in T: blocks of chunks one after another, with only the states between them kept for the
    backward pass; in a block, position by position through all chunks at once, first for the chunks'
    states, then for y.
    """
    B, T, I = x_BTI.shape
    Q = min(chunk, T)
    x, dtype = x_BTI.float(), x_BTI.dtype
    starts_BT = torch.zeros_like(x[..., 0]) if segments_BT is None else starts(segments_BT).float()
    inputs = [x * dt_BTI, dt_BTI, B_BTN.float(), C_BTN.float(), starts_BT[..., None]]
    if missing := -T % Q:
        inputs = [F.pad(t, (0, 0, 0, missing)) for t in inputs]
    h_BIN = x.new_zeros(B, *A_IN.shape) if state_BIN is None else state_BIN.float()

    step = Q * max(1, BLOCK_ELEMENTS // (B * A_IN.numel() * Q))
    blocks = list(zip(*(t.split(step, 1) for t in inputs)))
    ys = []
    for block in blocks:
        if len(blocks) > 1 and torch.is_grad_enabled():
            y, h_BIN = checkpoint(_scan_block, *block, A_IN, h_BIN, Q, use_reentrant=False)
        else:
            y, h_BIN = _scan_block(*block, A_IN, h_BIN, Q)
        ys.append(y)
    y_BTI = torch.addcmul(torch.cat(ys, 1)[:, :T], x, D_I.float())
    return y_BTI.to(dtype), h_BIN


def _scan_block(
    dtx_BTI: Tensor, dt_BTI: Tensor, B_BTN: Tensor, C_BTN: Tensor, starts_BT1: Tensor,
    A_IN: Tensor, h_BIN: Tensor, Q: int,
) -> tuple[Tensor, Tensor]:
    """A multiple of Q tokens. starts: 1 where a document begins, else 0."""
    in_chunks = [t.unflatten(1, (-1, Q)) for t in (dtx_BTI, dt_BTI, B_BTN, C_BTN, 1 - starts_BT1)]
    decay_QBcIN, added_QBcIN = [], []
    dtx_QBcI, dt_QBcI, B_QBcN, C_QBcN, on_QBc1 = (t.unbind(2) for t in in_chunks)
    for dtx_BcI, dt_BcI, B_BcN, on_Bc1 in zip(dtx_QBcI, dt_QBcI, B_QBcN, on_QBc1):
        decay_QBcIN.append((dt_BcI[..., None] * A_IN).exp() * on_Bc1[..., None])
        added_QBcIN.append(dtx_BcI[..., None] * B_BcN[..., None, :])

    before = [h_BIN]
    if in_chunks[0].shape[1] > 1:
        end_BcIN = added_QBcIN[0]
        for decay_BcIN, added_BcIN in zip(decay_QBcIN[1:], added_QBcIN[1:]):
            end_BcIN = torch.addcmul(added_BcIN, decay_BcIN, end_BcIN)
        _, dt_BcQI, _, _, on_BcQ1 = in_chunks
        whole_BcIN = (dt_BcQI.sum(2)[..., None] * A_IN).exp() * on_BcQ1.amin(2)[..., None]
        for whole_BIN, end_BIN in zip(whole_BcIN.unbind(1)[:-1], end_BcIN.unbind(1)):
            before.append(torch.addcmul(end_BIN, whole_BIN, before[-1]))

    h_BcIN, ys = torch.stack(before, 1), []
    for decay_BcIN, added_BcIN, C_BcN in zip(decay_QBcIN, added_QBcIN, C_QBcN):
        h_BcIN = torch.addcmul(added_BcIN, decay_BcIN, h_BcIN)
        ys.append((h_BcIN @ C_BcN[..., None])[..., 0])
    return torch.stack(ys, 2).flatten(1, 2), h_BcIN[:, -1]


class Module(KindModule):
    """Mamba-1. Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; conv as `causal_conv`; scan as
    `selective_scan`."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {"in_proj": F.linear, "conv": causal_conv, "scan": selective_scan, "out_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        rows = Rows.of(tokens, state)
        xz_BTE = self.enter(rows.pack(x_BTD), self.in_proj, norm)
        x_BTI, z_BTI = xz_BTE.chunk(2, -1)
        x_BTI, conv_state = self.convolve(x_BTI, rows, state)
        y_BTI, ssm_state = self._scanned(x_BTI, rows, rows.past(state, "ssm"))
        rows.keep(state, conv=conv_state, ssm=ssm_state)
        gated_BTI = (y_BTI.float() * F.silu(z_BTI.float())).to(z_BTI.dtype)
        y_BTD = rows.unpack(self.parts["out_proj"](gated_BTI, self.out_proj.weight, self.out_proj.bias))
        return (y_BTD, {"scan": rows.unpack(y_BTI)}) if self.gives else y_BTD

    def _scanned(self, x_BTI: Tensor, rows: Rows, state_BIN: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scan of all heads, and the state after it: heads are channels side by side."""
        heads = self.f.heads
        A_IN = -self.A_log.float().exp()
        past = [None] * heads if state_BIN is None else state_BIN.chunk(heads, 1)
        weights = (w.chunk(heads) for w in (self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, A_IN, self.D))
        ys, states = [], []
        for x, h, low, up, bias, A, D in zip(x_BTI.chunk(heads, -1), past, *weights):
            dt, B, C = self._selection(x, low, up, bias)
            y, h = self.parts["scan"](
                x, rows.without_padding(dt), A, B, C, D, chunk=self.f.chunk, segments_BT=rows.segments_BT, state_BIN=h,
            )
            ys.append(y)
            states.append(h)
        return (ys[0], states[0]) if heads == 1 else (torch.cat(ys, -1), torch.cat(states, 1))

    def _selection(
        self, x_BTI: Tensor, low_EI: Tensor, up_IR: Tensor, bias_I: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the input: dt [B, T, I] in float32, B and C [B, T, N]. From one head's rows of x_proj and
        dt_proj (E: R + 2N)."""
        f = self.f
        low, B, C = self.summed(F.linear(x_BTI, low_EI)).split([f.dt_rank, f.d_state, f.d_state], -1)
        if f.dt_bc_norm.name != "none":
            learned, eps = f.dt_bc_norm.name == "learned", f.dt_bc_norm.eps
            low = rms_norm(low, self.dt_norm.weight if learned else None, eps=eps)
            B = rms_norm(B, self.b_norm.weight if learned else None, eps=eps)
            C = rms_norm(C, self.c_norm.weight if learned else None, eps=eps)
        return F.softplus(F.linear(low, up_IR).float() + bias_I.float()), B, C
