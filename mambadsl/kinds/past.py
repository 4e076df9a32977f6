"""What layers that look back keep of past tokens: entries of each token, and what those tokens are. Torch.

A growing state has, beside its entries [B, S, ...], `positions` int64 and `segments` int32 [B, S] of their tokens; one
of fixed size has `used` int64 [B] instead: a row's tokens are in slots 0 to used - 1.
Letters: B batch, T time, S past tokens and those of this chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.attend import segments
from mambadsl.kinds.state import FixedState
from mambadsl.kinds.tokens import PADDING, Tokens


@dataclass(frozen=True)
class Seen:
    """What a chunk's tokens may look at: entries [B, S, ...] by name, what the chunk's queries are, and what the S keys
    are. new: the entries of the chunk alone [B, T, ...]."""

    entries: Mapping[str, Tensor]
    queries: Tokens
    keys: Tokens
    new: Mapping[str, Tensor]


def see(
    state: dict[str, Any] | None, new: Mapping[str, Tensor], tokens: Tokens, *, window: int | None = None, keep: int = 0
) -> Seen:
    """`extend`; without a state, the chunk is all there is."""
    if state is None:
        return Seen(new, tokens, tokens, new)
    return Seen(*extend(state, new, tokens, window=window, keep=keep), new)


def with_places(state: dict[str, Any]) -> dict[str, Any]:
    """A layer's empty state, and room for what its tokens are."""
    first = next(iter(state.values()))
    batch, device = first.shape[0], first.device
    if isinstance(state, FixedState):
        state["used"] = torch.zeros(batch, dtype=torch.int64, device=device)
    else:
        state["positions"] = torch.zeros((batch, 0), dtype=torch.int64, device=device)
        state["segments"] = torch.zeros((batch, 0), dtype=torch.int32, device=device)
    return state


def extend(
    state: dict[str, Any], new: Mapping[str, Tensor], tokens: Tokens, *, window: int | None = None, keep: int = 0
) -> tuple[dict[str, Tensor], Tokens, Tokens]:
    """new: this chunk's entries [B, T, ...], by name in the state. Returns all entries that the chunk may see, in the
    dtype of the new ones; what its queries are, and what the keys. The state takes the chunk in and keeps, with a
    window, the last window - 1 tokens of each row that are not padding, and the first `keep` of the document that it is
    in (or all that it has slots for)."""
    if isinstance(state, FixedState):
        return _insert(state, new, tokens)
    past = state["positions"].shape[1]
    added = {**new, "positions": tokens.positions_BT, "segments": segments(tokens)}
    grown = {name: torch.cat((state[name], t.to(state[name].dtype)), 1) for name, t in added.items()}
    state.update(grown if window is None else _last(grown, count=window - 1, keep=keep))
    if not past:
        return dict(new), tokens, tokens
    keys = Tokens(grown["positions"], grown["segments"])
    return {name: grown[name].to(t.dtype) for name, t in new.items()}, tokens, keys


def _insert(
    state: FixedState, new: Mapping[str, Tensor], tokens: Tokens
) -> tuple[dict[str, Tensor], Tokens, Tokens]:
    """`extend` in place: the real tokens of a row fill its slots from 0 on without gaps, so a slot's number is all
    that says who sees it. Padding goes to the last slot."""
    (B, T), used_B1 = tokens.positions_BT.shape, state["used"][:, None]
    slots, device = next(state[name].shape[1] for name in new), used_B1.device
    if tokens.segments_BT is None:
        place_BT = write_BT = used_B1 + torch.arange(T, device=device)
        state["used"].add_(T)
    else:
        real_BT = tokens.segments_BT != PADDING
        count_BT = real_BT.long().cumsum(1)
        # Padding asks as the first token of its row would: something finite to see.
        place_BT = torch.where(real_BT, used_B1 + count_BT - 1, 0)
        write_BT = torch.where(real_BT, place_BT, slots - 1)
        state["used"].add_(count_BT[:, -1])
    rows_B1 = torch.arange(B, device=device)[:, None]
    for name, entries in new.items():
        state[name].index_put_((rows_B1, write_BT), entries.to(state[name].dtype))
    past = state.room.used
    if not past and tokens.segments_BT is None:
        return dict(new), tokens, tokens
    # A single token looks at every slot: in a CUDA graph, `past` is whatever it was at the capture.
    seen = slots if T == 1 else past + T
    keys = Tokens(torch.arange(seen, device=device).expand(B, seen))
    return {name: state[name][:, :seen].to(t.dtype) for name, t in new.items()}, Tokens(place_BT), keys


def _last(state: dict[str, Tensor], *, count: int, keep: int) -> dict[str, Tensor]:
    """The last `count` entries of each row and the first `keep` of its last document, padding dropped first (a shape
    that needs no look at data)."""
    drop = state["segments"].shape[1] - count - keep
    if drop <= 0:
        return state
    worth_BS = (state["segments"] != PADDING).int()
    if keep:
        latest_B1 = state["segments"].amax(1, keepdim=True)
        worth_BS = worth_BS + worth_BS * ((state["positions"] < keep) & (state["segments"] == latest_B1))
    keep_BS = worth_BS.argsort(dim=1, stable=True)[:, drop:]
    rows_B1 = torch.arange(keep_BS.shape[0], device=keep_BS.device)[:, None]
    return {name: t[rows_B1, keep_BS] for name, t in state.items()}
