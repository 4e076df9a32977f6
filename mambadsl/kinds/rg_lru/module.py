"""Griffin's recurrent block in torch: the module, and the pure-torch definition of its scan.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t c_t,    a_t = exp(-sharpness r_t softplus(a_param)),    out = W (h * act(y))

c is the convolution's output, i and r its gates; of a document's first token, the square root counts 1. De and others,
arXiv:2402.19427; results match Hugging Face's RecurrentGemmaRecurrentBlock. Letters: B batch, T time, D d_model,
I d_inner, c chunks, Q tokens of a chunk, N blocks, W width of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.activations import ACTIVATIONS
from mambadsl.kinds.chunks import LONGEST_CHUNK, in_chunks
from mambadsl.kinds.conv import plain_conv
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rg_lru.kind import KIND
from mambadsl.kinds.rows import Rows, starts
from mambadsl.kinds.tokens import Tokens


def decaying_sums(
    u_BTI: Tensor, log_decay_BTI: Tensor, *, chunk: int, segments_BT: Tensor | None = None,
    state_BI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan h_t = exp(log_decay_t) h_{t-1} + u_t of each channel: h [B, T, I] and the last one [B, I], float32.

    h starts from `state_BI` (zeros where None), and from zeros at every later document of a row. log_decay: at most 0;
    both 0 at padding. By doubling spans inside chunks, chunk by chunk.
    """
    T = u_BTI.shape[1]
    Q = min(chunk, T, LONGEST_CHUNK)
    keeps_BTI = log_decay_BTI.float().exp()
    if segments_BT is not None:
        keeps_BTI = torch.where(starts(segments_BT)[..., None], 0, keeps_BTI)
    # After the last token, 1 is kept: the state stays as it is.
    u_BcQI, keeps_BcQI = in_chunks(u_BTI.float(), Q), 1 - in_chunks(1 - keeps_BTI, Q)
    span = 1
    while span < Q:
        ahead = (0, 0, span, 0)
        u_BcQI = u_BcQI + keeps_BcQI * F.pad(u_BcQI[:, :, :-span], ahead)
        keeps_BcQI = keeps_BcQI * F.pad(keeps_BcQI[:, :, :-span], ahead, value=1)
        span *= 2
    last_BI = torch.zeros_like(u_BcQI[:, 0, 0]) if state_BI is None else state_BI.float()
    before = []
    for u_BI, keeps_BI in zip(u_BcQI[:, :, -1].unbind(1), keeps_BcQI[:, :, -1].unbind(1)):
        before.append(last_BI)
        last_BI = torch.addcmul(u_BI, keeps_BI, last_BI)
    h_BcQI = torch.addcmul(u_BcQI, keeps_BcQI, torch.stack(before, 1)[:, :, None])
    return h_BcQI.flatten(1, 2)[:, :T], last_BI


class BoundedRoot(torch.autograd.Function):
    """The square root, its slope at most 1000 (as in RecurrentGemma): at 0 it has none."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        x, = ctx.saved_tensors
        return dy * (4 * x).clamp_min(1e-6).rsqrt()


class Module(KindModule):
    """Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; conv as `plain_conv`; scan as `decaying_sums`."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {"in_proj": F.linear, "conv": plain_conv, "scan": decaying_sums, "out_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f, rows = self.f, Rows.of(tokens, state)
        x_BTI, y_BTI = self.enter(rows.pack(x_BTD), self.in_proj, norm).chunk(2, -1)
        c_BTI, conv_state = self.convolve(x_BTI, rows, state)
        decay_BTI = -f.sharpness * self._gate(c_BTI, self.decay_gate) * F.softplus(self.a_param.float())
        share_BTI = BoundedRoot.apply(-torch.expm1(2 * decay_BTI))
        share_BTI = torch.where(self._first(tokens, rows)[..., None], 1, share_BTI)
        u_BTI = c_BTI.float() * self._gate(c_BTI, self.input_gate) * share_BTI
        h_BTI, last_BI = self.parts["scan"](
            rows.without_padding(u_BTI), rows.without_padding(decay_BTI), chunk=f.chunk,
            segments_BT=rows.segments_BT, state_BI=rows.past(state, "lru"),
        )
        rows.keep(state, conv=conv_state, lru=last_BI)
        y_BTI = h_BTI.to(y_BTI.dtype) * ACTIVATIONS[f.act](y_BTI)
        return rows.unpack(self.parts["out_proj"](y_BTI, self.out_proj.weight, self.out_proj.bias))

    def _gate(self, c_BTI: Tensor, gate: nn.Module) -> Tensor:
        """sigmoid of the product with the diagonal blocks, float32."""
        c_BTNW = c_BTI.unflatten(-1, (self.f.blocks, -1))
        g_BTI = torch.einsum("btnw,nvw->btnv", c_BTNW, gate.weight).flatten(2) + gate.bias
        return torch.sigmoid(g_BTI.float())

    def _first(self, tokens: Tokens, rows: Rows) -> Tensor:
        """Which tokens of the packed rows are the first of their document."""
        positions_BT = tokens.positions_BT
        return (positions_BT if rows.back_BT is None else positions_BT.gather(1, rows.back_BT)) == 0
