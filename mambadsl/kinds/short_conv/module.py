"""The gated short convolution in torch: y = W_out (C * conv(B * x)), [B | C | x] = W_in h.

Results match Hugging Face's Lfm2ShortConv. Letters: B batch, T time, D d_model, I d_inner.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.conv import plain_conv
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.short_conv.kind import KIND
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; conv as `plain_conv`."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {"in_proj": F.linear, "conv": plain_conv, "out_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        rows = Rows.of(tokens, state)
        B_BTI, C_BTI, x_BTI = self.enter(rows.pack(x_BTD), self.in_proj, norm).chunk(3, -1)
        y_BTI, conv_state = self.convolve(B_BTI * x_BTI, rows, state)
        rows.keep(state, conv=conv_state)
        return rows.unpack(self.parts["out_proj"](C_BTI * y_BTI, self.out_proj.weight, self.out_proj.bias))
