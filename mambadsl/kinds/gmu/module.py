"""The gated memory unit in torch: y = W_out (act(W_in x) * scan).

Letters: B batch, T time, D d_model, I d_inner.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.activations import ACTIVATIONS
from mambadsl.kinds.gmu.kind import KIND
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {"in_proj": F.linear, "out_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, scan: Tensor,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """scan: [B, T, I], of a layer above."""
        gate_BTI = ACTIVATIONS[self.f.act](self.enter(x_BTD, self.in_proj, norm))
        return self.parts["out_proj"](gate_BTI * scan, self.out_proj.weight, self.out_proj.bias)
