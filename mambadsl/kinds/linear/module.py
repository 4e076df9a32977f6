"""One projection in torch. Letters: B batch, T time, D what it reads."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.linear.kind import KIND
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """REFERENCE: out_proj (x_BTD, weight, bias or None) -> [B, T, d_model]."""

    kind = KIND
    ENTRY = "out_proj"
    REFERENCE = {"out_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        return self.enter(x_BTD, self.out_proj, norm)
