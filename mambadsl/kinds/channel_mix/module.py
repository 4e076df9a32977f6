"""RWKV-4's channel mixing in torch: y = sigmoid(W_r x_r) * W_down relu(W_up x_k) ** 2, x_r and x_k of a token and the
one before it.

Peng and others, arXiv:2305.13048; results match Hugging Face's RwkvFeedForward. Letters: B batch, T time, D d_model,
F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.activations import relu2
from mambadsl.kinds.channel_mix.kind import KIND
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.shift import mix, shifted
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """Slots: up_proj, r_proj, down_proj (x, weight, bias) -> y as F.linear."""

    kind = KIND
    REFERENCE = {"up_proj": F.linear, "r_proj": F.linear, "down_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        rows, parts = Rows.of(tokens, state), self.parts
        x_BTD = rows.pack(x_BTD)
        before_BTD, last_BD = shifted(x_BTD, rows, rows.past(state, "shift"))
        rows.keep(state, shift=last_BD)
        h_BTF = relu2(parts["up_proj"](mix(x_BTD, before_BTD, self.mix_k), self.up_proj.weight, None))
        r_BTD = parts["r_proj"](mix(x_BTD, before_BTD, self.mix_r), self.r_proj.weight, None)
        y_BTD = torch.sigmoid(r_BTD) * parts["down_proj"](h_BTF, self.down_proj.weight, None)
        return rows.unpack(y_BTD)
