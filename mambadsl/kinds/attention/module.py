"""Causal softmax attention in torch: grouped heads, rope, window, packed documents, a state that grows or is fixed.

Letters: B batch, T time (queries), S keys (past ones too), D d_model, H query heads, K key/value heads,
P head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.attention.kind import KIND, in_segments, rotary_dim
from mambadsl.kinds.attention.rope import rope_tables, rotate
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.norm import rms_norm
from mambadsl.kinds.state import FixedState, Room
from mambadsl.kinds.tokens import PADDING, Tokens


def attend(
    q_BTHP: Tensor,
    k_BSKP: Tensor,
    v_BSKP: Tensor,
    queries: Tokens,
    keys: Tokens,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of each token to the visible ones of its document, itself included: [B, T, H, P].

    queries: the batch's tokens. keys: what the S keys are; the same object as `queries` where there is
    no past. softcap: scores become softcap * tanh(score / softcap), in float32. sinks: of each head, the score of one
    more key, which is always seen and whose value is 0.
    """
    plain = keys is queries and queries.segments_BT is None and (window is None or window >= queries.length)
    fast = softcap is None and sinks_H is None
    mask_B1TS = None if plain and fast else visible(queries, keys, window=window)[:, None]
    q_BHTP, k_BKSP, v_BKSP = (t.transpose(1, 2) for t in (q_BTHP, k_BSKP, v_BSKP))
    if fast:
        grouped = q_BHTP.shape[1] != k_BKSP.shape[1]
        y_BHTP = F.scaled_dot_product_attention(
            q_BHTP, k_BKSP, v_BKSP, attn_mask=mask_B1TS, is_causal=plain, scale=scale, enable_gqa=grouped
        )
    else:
        k_BHSP, v_BHSP = (t.repeat_interleave(q_BHTP.shape[1] // t.shape[1], 1) for t in (k_BKSP, v_BKSP))
        scores_BHTS = q_BHTP.float() @ k_BHSP.float().transpose(2, 3) * scale
        if softcap is not None:
            scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
        scores_BHTS = scores_BHTS.masked_fill(~mask_B1TS, float("-inf"))
        if sinks_H is not None:
            sinks_BHT1 = sinks_H.float()[:, None, None].expand(*scores_BHTS.shape[:3], 1)
            scores_BHTS = torch.cat((scores_BHTS, sinks_BHT1), -1)
        share_BHTS = scores_BHTS.softmax(-1)[..., : k_BHSP.shape[2]]
        y_BHTP = share_BHTS.to(v_BHSP.dtype) @ v_BHSP
    return y_BHTP.transpose(1, 2)


def visible(queries: Tokens, keys: Tokens, *, window: int | None) -> Tensor:
    """Which keys a query sees, bool [B, T, S]: its own document's, up to its own position, window - 1 back.

    Padding sees padding, itself at least, so that no row is empty: softmax of nothing is not finite.
    """
    query_BT1, key_B1S = queries.positions_BT[:, :, None], keys.positions_BT[:, None]
    mask_BTS = key_B1S <= query_BT1
    if window is not None:
        mask_BTS = mask_BTS & (key_B1S > query_BT1 - window)
    if queries.segments_BT is not None or keys.segments_BT is not None:
        mask_BTS = mask_BTS & (_segments(queries)[:, :, None] == _segments(keys)[:, None])
    return mask_BTS


def _segments(tokens: Tokens) -> Tensor:
    if tokens.segments_BT is not None:
        return tokens.segments_BT
    return torch.zeros_like(tokens.positions_BT, dtype=torch.int32)


def extend(
    state: dict[str, Any], k_BTKP: Tensor, v_BTKP: Tensor, tokens: Tokens, *, window: int | None
) -> tuple[Tensor, Tensor, Tokens, Tokens]:
    """All keys and values that this chunk may see; what its queries are, and what the keys. The state takes the chunk
    in and keeps, with a window, the last window - 1 tokens of each row that are not padding (or all that it
    has slots for)."""
    if isinstance(state, FixedState):
        return _insert(state, k_BTKP, v_BTKP, tokens)
    new = dict(k=k_BTKP, v=v_BTKP, positions=tokens.positions_BT, segments=_segments(tokens))
    past = state["positions"].shape[1]
    grown = {name: torch.cat((state[name], t.to(state[name].dtype)), 1) for name, t in new.items()}
    state.update(grown if window is None else _last(grown, count=window - 1))
    if not past:
        return k_BTKP, v_BTKP, tokens, tokens
    keys = Tokens(grown["positions"], grown["segments"])
    return grown["k"].to(k_BTKP.dtype), grown["v"].to(v_BTKP.dtype), tokens, keys


def _insert(
    state: FixedState, k_BTKP: Tensor, v_BTKP: Tensor, tokens: Tokens
) -> tuple[Tensor, Tensor, Tokens, Tokens]:
    """`extend` in place: the real tokens of a row fill its slots from 0 on without gaps, so a slot's number is all
    that says who sees it. Padding goes to the last slot."""
    (B, T), slots, used_B1 = tokens.positions_BT.shape, state["k"].shape[1], state["used"][:, None]
    if tokens.segments_BT is None:
        place_BT = write_BT = used_B1 + torch.arange(T, device=k_BTKP.device)
        state["used"].add_(T)
    else:
        real_BT = tokens.segments_BT != PADDING
        count_BT = real_BT.long().cumsum(1)
        # Padding asks as the first token of its row would: something finite to see.
        place_BT = torch.where(real_BT, used_B1 + count_BT - 1, 0)
        write_BT = torch.where(real_BT, place_BT, slots - 1)
        state["used"].add_(count_BT[:, -1])
    rows_B1 = torch.arange(B, device=k_BTKP.device)[:, None]
    for name, new in ("k", k_BTKP), ("v", v_BTKP):
        state[name].index_put_((rows_B1, write_BT), new.to(state[name].dtype))
    past = state.room.used
    if not past and tokens.segments_BT is None:
        return k_BTKP, v_BTKP, tokens, tokens
    # A single token looks at every slot: in a CUDA graph, `past` is whatever it was at the capture.
    seen = slots if T == 1 else past + T
    keys = Tokens(torch.arange(seen, device=k_BTKP.device).expand(B, seen))
    k_BSKP, v_BSKP = (state[name][:, :seen].to(k_BTKP.dtype) for name in ("k", "v"))
    return k_BSKP, v_BSKP, Tokens(place_BT), keys


def _last(state: dict[str, Tensor], *, count: int) -> dict[str, Tensor]:
    """The last `count` entries of each row, padding dropped first (a shape that needs no look at data)."""
    drop = state["segments"].shape[1] - count
    if drop <= 0:
        return state
    real_BS = state["segments"] != PADDING
    keep_BS = real_BS.int().argsort(dim=1, stable=True)[:, drop:]
    rows_B1 = torch.arange(keep_BS.shape[0], device=keep_BS.device)[:, None]
    return {name: t[rows_B1, keep_BS] for name, t in state.items()}


class Module(KindModule):
    """REFERENCE: qkv_proj and o_proj (x, weight, bias or None) -> [B, T, out]; core as `attend`.

    Its state has, beside k and v after rope [B, S, K, P], what those keys are: `positions` int64 and
    `segments` int32 [B, S]; or, of fixed size, `used` int64 [B]: the row's tokens are in slots 0 to used - 1.
    """

    kind = KIND
    ENTRY = "qkv_proj"
    REFERENCE = {"qkv_proj": F.linear, "core": attend, "o_proj": F.linear}

    def init_state(self, batch: int, *, room: Room | None = None, **made: Any) -> dict[str, Any]:
        state = super().init_state(batch, room=room, **made)
        device = state["k"].device
        if room is not None:
            state["used"] = torch.zeros(batch, dtype=torch.int64, device=device)
            return state
        state["positions"] = torch.zeros((batch, 0), dtype=torch.int64, device=device)
        state["segments"] = torch.zeros((batch, 0), dtype=torch.int32, device=device)
        return state

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f = self.f
        qkv = self.enter(x_BTD, self.qkv_proj, norm)
        q, k, v, *gate = qkv.split([size for _, size in in_segments(f)], -1)
        if f.qk_norm.name == "full_width":
            q, k = self._norm(q, k)
        q_BTHP, k_BTKP, v_BTKP = (t.unflatten(-1, (-1, f.head_dim)) for t in (q, k, v))
        if f.qk_norm.name == "per_head":
            q_BTHP, k_BTKP = self._norm(q_BTHP, k_BTKP)
        if f.key_multiplier != 1:
            k_BTKP = k_BTKP * f.key_multiplier
        if rotary_dim(f):
            cos_sin = rope_tables(f.rope, rotary_dim(f), tokens)
            q_BTHP, k_BTKP = rotate(q_BTHP, *cos_sin), rotate(k_BTKP, *cos_sin)
        queries = keys = tokens
        if state is not None:
            k_BTKP, v_BTKP, queries, keys = extend(state, k_BTKP, v_BTKP, tokens, window=f.window)
        how = dict(scale=f.head_dim**-0.5 if f.scale is None else f.scale, window=f.window, softcap=f.softcap)
        if f.sinks:
            how["sinks_H"] = self.sinks
        mix = self._difference if f.differential.name == "halves" else self.parts["core"]
        y_BTHP = mix(q_BTHP, k_BTKP, v_BTKP, queries, keys, **how)
        if gate:
            # [B, T, H, P] or, of whole heads, [B, T, H, 1].
            y_BTHP = y_BTHP * torch.sigmoid(gate[0]).unflatten(-1, (f.heads, -1))
        return self.parts["o_proj"](y_BTHP.flatten(2), self.o_proj.weight, self.o_proj.bias)

    def _difference(self, q_BTHP: Tensor, k_BSKP: Tensor, v_BSKP: Tensor, *seen: Tokens, **how: Any) -> Tensor:
        """Differential attention: head h of the first half less a share of head h of the second, with the values of
        both, normed. The core runs once for each half of the values, whose width is then the heads' own."""
        form = self.f.differential
        values = (half.repeat(1, 1, 2, 1) for half in v_BSKP.chunk(2, 2))
        runs = [self.parts["core"](q_BTHP, k_BSKP, v, *seen, **how) for v in values]
        first, second = torch.cat(runs, -1).chunk(2, 2)
        q1, k1, q2, k2 = self.get_parameter("lambda").float()
        start = self.lambda_start
        share = (q1 @ k1).exp() - (q2 @ k2).exp() + start
        weight = self.sub_norm.weight if form.weight else None
        y_BTHP = rms_norm(first.float() - share * second.float(), weight, eps=form.eps) * (1 - start)
        return y_BTHP.to(q_BTHP.dtype).unflatten(-1, (2, -1)).flatten(2, 3)

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.f.qk_norm
        how = dict(eps=norm.eps, zero_centered=norm.zero_centered)
        return rms_norm(q, self.q_norm.weight, **how), rms_norm(k, self.k_norm.weight, **how)
