"""Feed-forward layer in torch: down(act(up(x))), or down(act(gate(x)) * up(x)).

Letters: B batch, T time, D d_model, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.activations import activate
from mambadsl.kinds.mlp.kind import KIND
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """REFERENCE: up_proj and down_proj (x_BTD, weight, bias or None) -> [B, T, out];
    act (h_BTF or [gate | up], *, act, gated, gate_multiplier) -> h_BTF."""

    kind = KIND
    ENTRY = "up_proj"
    REFERENCE = {"up_proj": F.linear, "act": activate, "down_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f, parts = self.f, self.parts
        up = self.gate_up_proj if f.gated else self.up_proj
        h_BTF = self.enter(x_BTD, up, norm)
        h_BTF = parts["act"](h_BTF, act=f.act, gated=f.gated, gate_multiplier=f.gate_multiplier)
        return parts["down_proj"](h_BTF, self.down_proj.weight, self.down_proj.bias)
