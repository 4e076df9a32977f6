"""Causal softmax attention in torch: grouped heads, rope, window, packed documents, a state that grows or is fixed.

Letters: B batch, T time, D d_model, H query heads, K key/value heads, P head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.attend import attend
from mambadsl.kinds.attention.kind import KIND, in_segments, rotary_dim
from mambadsl.kinds.attention.rope import rope_tables, rotate
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.norm import rms_norm
from mambadsl.kinds.past import Seen, see, with_places
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """REFERENCE: qkv_proj and o_proj (x, weight, bias or None) -> [B, T, out]; core as `attend`.

    Its state has k and v after rope [B, S, K, P], and what those keys are, as in `kinds/past.py`.
    """

    kind = KIND
    ENTRY = "qkv_proj"
    REFERENCE = {"qkv_proj": F.linear, "core": attend, "o_proj": F.linear}

    def init_state(self, batch: int, **made: Any) -> dict[str, Any]:
        state = super().init_state(batch, **made)
        return state if self.takes else with_places(state)

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None,
        kv: Seen | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Seen]]:
        """kv: the keys and values that a layer above gave, of a layer that takes them."""
        f = self.f
        qkv = self.enter(x_BTD, self.qkv_proj, norm)
        parts = dict(zip((name for name, _ in in_segments(f)), qkv.split([size for _, size in in_segments(f)], -1)))
        cos_sin = rope_tables(f.rope, rotary_dim(f), tokens) if rotary_dim(f) else None
        q_BTHP = self._heads(parts["q"], "q", cos_sin)
        if kv is None:
            k_BTKP = self._heads(parts["k"], "k", cos_sin)
            v_BTKP = parts["v"].unflatten(-1, (-1, f.head_dim))
            kv = see(state, dict(k=k_BTKP, v=v_BTKP), tokens, window=f.window, keep=f.keep)
        how = dict(scale=f.head_dim**-0.5 if f.scale is None else f.scale, window=f.window, softcap=f.softcap)
        if f.keep:
            how["keep"] = f.keep
        if f.sinks:
            how["sinks_H"] = self.sinks
        mix = self._difference if f.differential.name == "halves" else self.parts["core"]
        y_BTHP = mix(q_BTHP, kv.entries["k"], kv.entries["v"], kv.queries, kv.keys, **how)
        if "gate" in parts:
            # [B, T, H, P] or, of whole heads, [B, T, H, 1].
            y_BTHP = y_BTHP * torch.sigmoid(parts["gate"]).unflatten(-1, (f.heads, -1))
        y_BTD = self.parts["o_proj"](y_BTHP.flatten(2), self.o_proj.weight, self.o_proj.bias)
        return (y_BTD, {"kv": kv}) if self.gives else y_BTD

    def _heads(self, h: Tensor, name: str, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries or keys of each head, normed and turned: [B, T, H or K, P]."""
        f = self.f
        if f.qk_norm.name == "full_width":
            h = self._norm(h, name)
        h = h.unflatten(-1, (-1, f.head_dim))
        if f.qk_norm.name == "per_head":
            h = self._norm(h, name)
        if name == "k" and f.key_multiplier != 1:
            h = h * f.key_multiplier
        return h if cos_sin is None else rotate(h, *cos_sin)

    def _difference(self, q_BTHP: Tensor, k_BSKP: Tensor, v_BSKP: Tensor, *seen: Tokens, **how: Any) -> Tensor:
        """Differential attention: head h of the first half less a share of head h of the second, with the values of
        both, normed. The core runs once for each half of the values, whose width is then the heads' own."""
        form = self.f.differential
        values = (half.repeat(1, 1, 2, 1) for half in v_BSKP.chunk(2, 2))
        runs = [self.parts["core"](q_BTHP, k_BSKP, v, *seen, **how) for v in values]
        first, second = torch.cat(runs, -1).chunk(2, 2)
        # By its key: torch.compile writes `.lambda` for an attribute, which is no Python.
        q1, k1, q2, k2 = self._parameters["lambda"].float()
        start = self.lambda_start
        share = (q1 @ k1).exp() - (q2 @ k2).exp() + start
        weight = self.sub_norm.weight if form.weight else None
        y_BTHP = rms_norm(first.float() - share * second.float(), weight, eps=form.eps) * (1 - start)
        return y_BTHP.to(q_BTHP.dtype).unflatten(-1, (2, -1)).flatten(2, 3)

    def _norm(self, h: Tensor, name: str) -> Tensor:
        norm, weight = self.f.qk_norm, self.get_parameter(f"{name}_norm.weight")
        # Key/value heads that several ranks have are so many times in the mean, all alike.
        averaged = self.averaged if norm.name == "full_width" else None
        return rms_norm(h, weight, eps=norm.eps, zero_centered=norm.zero_centered, averaged=averaged)
