"""A layer's decoding state: tensors by name. Torch.

A plain dict grows and is replaced: new tensors take the place of old ones. A `FixedState` stays where it is: every
tensor keeps its address and is written in place, so that a CUDA graph can read and write it; keys and values have room
for `capacity` tokens of each row. Its rows are one document each, with padding or without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Room:
    """How many tokens each row can have, and how many the longest row has: known to the host, one for all layers."""

    capacity: int
    used: int = 0

    def check(self, tokens: int) -> None:
        """ValueError where so many more tokens do not fit."""
        if self.used + tokens > self.capacity:
            after = f" after {self.used}" if self.used else ""
            raise ValueError(f"{tokens} tokens{after} do not fit into a decoding state for {self.capacity}")


class FixedState(dict[str, Any]):
    """capacity: tokens of each row that there is room for. room: what the host knows of it."""

    def __init__(self, tensors: dict[str, Tensor], *, capacity: int, room: Room | None = None):
        super().__init__(tensors)
        self.room = room or Room(capacity)

    @property
    def capacity(self) -> int:
        return self.room.capacity


def put(state: dict[str, Any], name: str, tensor: Tensor) -> None:
    """Writes one tensor of the state, in the dtype that it has there."""
    if not isinstance(state, FixedState):
        state[name] = tensor.to(state[name].dtype) if name in state else tensor
    elif name != "segment":
        # The document that a row is in: always the same one here.
        state[name].copy_(tensor)
