"""Multi-head latent attention in torch: the plain form, and for single tokens the absorbed one, which attends to the
latents themselves.

With keys k = U c and values v = W c of a latent c, scores are q . U c = (U^T q) . c and what a head gives is
W (sum of shares times c): a token that is decoded thus reads the latents of the past as one key/value head, and no keys
and values of it are made again (DeepSeek-V2, section 2.1.2).
Letters: B batch, T time, S keys (past ones too), D d_model, H heads, N nope_dim, R rope_dim, E = N + R, P value_dim,
C kv_rank, L = C + R.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.attend import attend
from mambadsl.kinds.attention.rope import rope_tables, rotate
from mambadsl.kinds.mla.kind import KIND, in_segments, kv_segments, qk_dim
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.norm import rms_norm
from mambadsl.kinds.past import extend, with_places
from mambadsl.kinds.tokens import Tokens


class Module(KindModule):
    """REFERENCE: in_proj and o_proj (x, weight, bias or None) -> [B, T, out]; core as `attend`.

    Its state has of each token [latent | k_rope], normed and rotated, [B, S, L], and what those tokens are, as in
    `kinds/past.py`.
    """

    kind = KIND
    ENTRY = "in_proj"
    REFERENCE = {"in_proj": F.linear, "core": attend, "o_proj": F.linear}

    def init_state(self, batch: int, **made: Any) -> dict[str, Any]:
        return with_places(super().init_state(batch, **made))

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f = self.f
        projected = self.enter(x_BTD, self.in_proj, norm)
        q, latent_BTC, key_BTR, *gate = projected.split([size for _, size in in_segments(f)], -1)
        if f.q_rank:
            q = F.linear(rms_norm(q, self.q_norm.weight, eps=f.norm_eps), self.q_proj.weight)
        q_BTHE = q.unflatten(-1, (f.heads, qk_dim(f)))
        if f.rope.name == "rope":
            q_BTHE, key_BTR = self._turned(q_BTHE, key_BTR, tokens)
        past_BSL = torch.cat((rms_norm(latent_BTC, self.latent_norm.weight, eps=f.norm_eps), key_BTR), -1)
        queries = keys = tokens
        if state is not None:
            seen, queries, keys = extend(state, dict(latent=past_BSL), tokens)
            past_BSL = seen["latent"]
        attend_to = self._latents if tokens.length == 1 and state is not None else self._heads
        y_BTHP = attend_to(q_BTHE, past_BSL, queries, keys)
        if gate:
            # [B, T, H, P] or, of whole heads, [B, T, H, 1].
            y_BTHP = y_BTHP * torch.sigmoid(gate[0]).unflatten(-1, (f.heads, -1))
        return self.parts["o_proj"](y_BTHP.flatten(2), self.o_proj.weight, self.o_proj.bias)

    def _turned(self, q_BTHE: Tensor, key_BTR: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Queries and shared key channels, rotated. Neighbours are first put half of the channels apart, in both alike:
        their products stay the same."""
        f, cos_sin = self.f, rope_tables(self.f.rope, self.f.rope_dim, tokens)
        plain_BTHN, turned_BTHR = q_BTHE.split([f.nope_dim, f.rope_dim], -1)
        both = turned_BTHR, key_BTR[:, :, None]
        if f.rope.pairs == "interleaved":
            both = (t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for t in both)
        turned_BTHR, key_BT1R = (rotate(t, *cos_sin) for t in both)
        return torch.cat((plain_BTHN, turned_BTHR), -1), key_BT1R[:, :, 0]

    def _heads(self, q_BTHE: Tensor, past_BSL: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
        """Attention with the keys and values of every head: [B, T, H, P]."""
        f = self.f
        latent_BSC, key_BSR = past_BSL.split([f.kv_rank, f.rope_dim], -1)
        kv = F.linear(latent_BSC, self.kv_proj.weight).split([size for _, size in kv_segments(f)], -1)
        k_BSHN, v_BSHP = (t.unflatten(-1, (f.heads, -1)) for t in kv)
        k_BSHE = torch.cat((k_BSHN, key_BSR[:, :, None].expand(-1, -1, f.heads, -1)), -1)
        return self._core(q_BTHE, k_BSHE, v_BSHP, queries, keys)

    def _latents(self, q_BTHE: Tensor, past_BSL: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
        """The same, in the latent: its only key/value head is [latent | k_rope], and the latent."""
        f = self.f
        to_k, to_v = self.kv_proj.weight.split([size for _, size in kv_segments(f)])
        q_BTHN, q_BTHR = q_BTHE.split([f.nope_dim, f.rope_dim], -1)
        q_BTHC = torch.einsum("bthn,hnc->bthc", q_BTHN, to_k.unflatten(0, (f.heads, -1)))
        past_BS1L = past_BSL[:, :, None]
        y_BTHC = self._core(
            torch.cat((q_BTHC, q_BTHR), -1), past_BS1L, past_BS1L[..., : f.kv_rank], queries, keys
        )
        return torch.einsum("bthc,hpc->bthp", y_BTHC, to_v.unflatten(0, (f.heads, -1)))

    def _core(self, q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
        scale = qk_dim(self.f) ** -0.5 if self.f.scale is None else self.f.scale
        return self.parts["core"](q, k, v, queries, keys, scale=scale, window=None, softcap=None)
