"""What layers give to layers below, where a stage begins and ends.

In a stage, what is kept (keys and values) goes from layer to layer as a `Seen`: takers look at the cache of the giver.
From stage to stage goes one tensor of the new tokens; a later stage with takers has a cache of its own, in its decoding
state by the giver's path. The states of blocks are tensors apart, and one between stages (`earlier.py`). Everything
else that is carried goes as it is.
Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambadsl.build.earlier import States
from mambadsl.build.stage import Stage
from mambadsl.build.state import DecodingState
from mambadsl.graph.graph import LayerGraph
from mambadsl.kinds.kind import Carried, State
from mambadsl.kinds.module import empty_state
from mambadsl.kinds.past import Seen, see, with_places
from mambadsl.kinds.registry import get
from mambadsl.kinds.tokens import Tokens


@dataclass(frozen=True)
class Relay:
    """Something kept that layers of this stage take and a branch of an earlier one gives. path: of that branch.
    table: what it keeps, as the branch itself declares it."""

    carried: Carried
    path: str
    table: tuple[State, ...]

    def init_state(self, batch: int, **made: Any) -> dict[str, Any]:
        return with_places(empty_state(self.table, batch, **made))

    def opened(self, new: Tensor, tokens: Tokens, state: DecodingState | None) -> Seen:
        """new: [B, T, *shape]. With a state, the stage's cache takes it in."""
        entries = dict(zip(self.carried.kept, new.unbind(2)))
        own, first = None if state is None else state.layers[self.path], self.table[0]
        return see(own, entries, tokens, window=first.window, keep=first.keep)


def relays(graph: LayerGraph, stage: Stage) -> dict[str, Relay]:
    """By the name of what is carried."""
    here = set(stage.paths)
    given = {(e.source, e.tensor) for e in graph.edges if e.target in here and e.source not in here}
    return {
        relay.carried.name: relay
        for node in graph.nodes for relay in _given(graph, node) if (node.path, relay.carried.name) in given
    }


def closed(value: Tensor | Seen | States) -> Tensor:
    """What is sent of it: of something kept, the new tokens; states of blocks side by side."""
    if isinstance(value, tuple):
        return torch.cat(value, -1)
    return torch.stack(list(value.new.values()), 2) if isinstance(value, Seen) else value


def _given(graph: LayerGraph, node: Any) -> Iterator[Relay]:
    """What a node gives and keeps."""
    for path, _, mixer in node.branches():
        kind, dims = get(mixer.kind), node.dims(graph.model.d_model)
        for carried in kind.gives(mixer.fields, dims):
            if carried.kept:
                table = tuple(s for s in kind.state(mixer.fields, dims) if s.name in carried.kept)
                yield Relay(carried, path, table)
