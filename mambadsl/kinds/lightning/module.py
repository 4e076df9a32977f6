"""Lightning attention in torch. For each head h, with q, k and v through silu:

    S_t = exp(-slope_h) S_{t-1} + v_t k_t^T        y_t = S_t q_t        out = W (norm(y) * sigmoid(z))

That is the SSD scan with steps of 1. Qin and others, arXiv:2401.04658; results match Hugging Face's
MiniMaxLightningAttention. Letters: B batch, T time, D d_model, H heads, P head_dim, I = H * P.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.gate_norm import gate_norm
from mambadsl.kinds.lightning.kind import KIND, d_inner
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.ssd import ssd
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """Slots: in_proj, out_proj (x, weight, bias) -> y as F.linear; scan as `ssd`; gate_norm as `gate_norm`."""

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {"in_proj": F.linear, "scan": ssd, "gate_norm": gate_norm, "out_proj": F.linear}

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f, rows = self.f, Rows.of(tokens, state)
        qkv, z_BTI = self.enter(rows.pack(x_BTD), self.in_proj, norm).split([3 * d_inner(f), d_inner(f)], -1)
        q_BTHP, k_BTHP, v_BTHP = F.silu(qkv).unflatten(-1, (3, f.heads, f.head_dim)).unbind(2)
        steps_BTH = torch.ones(v_BTHP.shape[:3], device=v_BTHP.device)
        y_BTHP, kv = self.parts["scan"](
            v_BTHP, rows.without_padding(steps_BTH), -self.slope, k_BTHP, q_BTHP, torch.zeros_like(self.slope),
            chunk=f.chunk, segments_BT=rows.segments_BT, state_BHPN=rows.past(state, "kv"),
        )
        rows.keep(state, kv=kv)
        how = dict(order="before_gate", groups=1, eps=f.norm_eps, gate="sigmoid")
        if self.averaged:
            how["averaged"] = self.averaged
        y_BTI = self.parts["gate_norm"](y_BTHP.flatten(-2), z_BTI, self.gate_norm.weight, **how)
        return rows.unpack(self.parts["out_proj"](y_BTI, self.out_proj.weight, self.out_proj.bias))
