"""What a batch of tokens is, and where each row stands between calls.

In: segments, padding mask, positions as the caller has them, and a decoding state. Out: `Tokens`, the one
description that every layer gets. Refuses (ValueError) shapes that do not fit the tokens, a state of
another batch size or with too little room, and document numbers that go back within a row.

Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.state import FixedState, Room
from mambadsl.kinds.tokens import PADDING, Tokens


@dataclass
class DecodingState:
    """What the tokens so far have left behind. Forward passes change it in place; after one that raised it
    is worth nothing.

    layers: branch path (`stack.3`, `stack.4.1`) -> that layer's tensors, also of a branch in an earlier stage whose
    keys and values are taken here. position_B: place of each row's
    next token in its document. segment_B: document of each row's last token; None while no call has named
    documents or padding. room: of a state of fixed size, whose tensors (position_B too) stay where they are and whose
    rows are one document each; None: it grows. read: tokens so far, of the longest row, of a state that grows.
    """

    layers: dict[str, dict[str, Any]]
    position_B: Tensor
    segment_B: Tensor | None = None
    room: Room | None = None
    read: int = 0

    @property
    def empty(self) -> bool:
        """Before the first call."""
        return not (self.read if self.room is None else self.room.used)

    def copy(self) -> DecodingState:
        """A snapshot: later calls on either leave the other alone."""
        room = None if self.room is None else replace(self.room)

        def copied(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        layers = {path: {name: copied(v) for name, v in state.items()} for path, state in self.layers.items()}
        if room is not None:
            layers = {path: FixedState(t, capacity=room.capacity, room=room) for path, t in layers.items()}
        return DecodingState(layers, self.position_B.clone(), copied(self.segment_B), room, self.read)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, `position_B` last."""
        for state in self.layers.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield self.position_B

    def clear(self) -> None:
        """Back before the first token, in place; of a state of fixed size only (ValueError)."""
        if self.room is None:
            raise ValueError("a growing state is not cleared: make a new one with `init_state`")
        for tensor in self.tensors():
            tensor.zero_()
        self.room.used = 0

    def advance(self, tokens: Tokens) -> None:
        """The rows now stand after these tokens; rows of nothing but padding stay where they were."""
        self.read += tokens.length
        if self.room is not None:
            self.room.used += tokens.length
        if tokens.segments_BT is None:
            last_B = tokens.positions_BT[:, -1]
            self.position_B = torch.add(last_B, 1, out=None if self.room is None else self.position_B)
            return
        real_BT = tokens.segments_BT != PADDING
        last_B1 = tokens.length - 1 - real_BT.flip(1).int().argmax(1, keepdim=True)
        some_B = real_BT.any(1)
        position_B = tokens.positions_BT.gather(1, last_B1)[:, 0] + 1
        position_B = torch.where(some_B, position_B, self.position_B)
        if self.room is not None:
            self.position_B.copy_(position_B)
        else:
            self.position_B = position_B
            before_B = torch.zeros_like(tokens.segments_BT[:, 0]) if self.segment_B is None else self.segment_B
            self.segment_B = torch.where(some_B, tokens.segments_BT.gather(1, last_B1)[:, 0], before_B)


def describe(
    shape: tuple[int, int], *, device: Any = None, segments: Tensor | None = None,
    valid: Tensor | None = None, positions: Tensor | None = None, state: DecodingState | None = None,
) -> Tokens:
    """Tokens of a [B, T] batch. segments: document numbers [B, T], non-decreasing along a row, negative for
    padding. valid: bool [B, T], False for padding. positions: [B, T] or [T]; default: counted in each
    document, on from the state."""
    B, T = shape
    if not (B and T):
        raise ValueError(f"a batch needs at least one row and one token, not {B} x {T}")
    for name, given in ("segments", segments), ("valid", valid), ("positions", positions):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"`{name}` must be a tensor, not {type(given).__name__}")
    if state is not None and not isinstance(state, DecodingState):
        raise TypeError(f"`state` comes from `init_state`, and is no {type(state).__name__}")
    for name, given in ("segments", segments), ("valid", valid):
        if given is not None and tuple(given.shape) != (B, T):
            raise ValueError(f"`{name}` must be [{B}, {T}] like the tokens, not {list(given.shape)}")
    if state is not None and state.position_B.shape[0] != B:
        raise ValueError(f"the state is of {state.position_B.shape[0]} rows and the batch of {B}")
    if state is not None and state.room is not None:
        if segments is not None:
            raise ValueError("rows of a state of fixed size are one document each: `valid` says what is padding")
        state.room.check(T)
    if positions is not None:
        if tuple(positions.shape) not in ((B, T), (T,)):
            raise ValueError(f"`positions` must be [{B}, {T}] or [{T}], not {list(positions.shape)}")
        positions = positions.long().expand(B, T)
    start_B = torch.zeros(B, dtype=torch.int64, device=device) if state is None else state.position_B
    if segments is None and valid is None and (state is None or state.segment_B is None):
        if positions is None:
            # One token stands where the state does: no copy, since this is run for every token.
            positions = start_B[:, None] if T == 1 else start_B[:, None] + torch.arange(T, device=device)
        return Tokens(positions, None)
    zeros_BT = torch.zeros((B, T), dtype=torch.int32, device=device)
    segments_BT = zeros_BT if segments is None else segments.int().clamp_min(PADDING)
    if valid is not None:
        segments_BT = torch.where(valid.bool(), segments_BT, PADDING)
    last_B = zeros_BT[:, 0] if state is None or state.segment_B is None else state.segment_B
    before_BT = before(segments_BT, last_B)
    # A look at the data: free on a CPU, a wait for the device elsewhere, and nothing that can be traced.
    looks = segments_BT.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and _goes_back(segments_BT):
        raise ValueError("document numbers in `segments` must not go down along a row: documents would mix")
    if positions is None:
        positions = _count(segments_BT, before_BT, start_B)
    return Tokens(positions, segments_BT)


def before(segments_BT: Tensor, last_B: Tensor) -> Tensor:
    """The document of the last real token before each token."""
    shifted_BT = torch.cat((torch.full_like(segments_BT[:, :1], PADDING), segments_BT[:, :-1]), 1)
    highest_BT = shifted_BT.cummax(1).values
    return torch.where(highest_BT == PADDING, last_B[:, None], highest_BT)


def _goes_back(segments_BT: Tensor) -> bool:
    real_BT = segments_BT != PADDING
    return bool((real_BT & (segments_BT < segments_BT.cummax(1).values)).any())


def _count(segments_BT: Tensor, before_BT: Tensor, start_B: Tensor) -> Tensor:
    """Place of each token among the real tokens of its document; padding repeats its neighbour's place."""
    real_BT = segments_BT != PADDING
    count_BT = real_BT.long().cumsum(1)
    first_BT = real_BT & (segments_BT != before_BT)
    origin_BT = torch.where(first_BT, count_BT - 1, -start_B[:, None]).cummax(1).values
    return (count_BT - 1 - origin_BT).clamp_min(0)
