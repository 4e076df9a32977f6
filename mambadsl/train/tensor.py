"""Layers that tensor ranks compute together: each runs its part, and what the parts give is added up.
(`vocabulary.py` does the same for the table and the head.)

In: a model of the rank's part, the whole graph, the world. Out: the model, its mixers joined, and what the rank has of
weights. The stream, the norms before mixers and what is added to the stream are whole on every rank (Shoeybi et al.,
arXiv:1909.08053, section 3): a mixer reads the whole stream, whose gradient is the sum of the parts', and gives the sum
of the parts' outputs. Inside, norms over channels of several ranks take means over them (`averaged`), and projections
from such channels sums (`summed`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from mambadsl.build.model import Model
from mambadsl.graph.graph import LayerGraph
from mambadsl.kinds.module import KindModule
from mambadsl.train.slices import Slice, same, shared, slices
from mambadsl.train.world import World


def join(model: Model, graph: LayerGraph, world: World) -> dict[str, Slice]:
    """Lets the model of one rank's part of the graph compute its layers with the other ranks'. Path -> what the rank
    has of the weight, of those whose gradients come from parts."""
    ranks, rank = world.ranks("tensor"), world.at("tensor")
    found = slices(graph, model.graph, ranks=ranks, rank=rank)
    for path, held in found.items():
        if held is None and path in model.weights:
            _drop(model, path)
    group = world.group("tensor")
    for path, mixer in model.named_modules():
        # Of a shared layer, the uses have the owner's hooks.
        if isinstance(mixer, KindModule) and any(name.startswith(f"{path}.") for name in found):
            mixer.register_forward_pre_hook(lambda _, given: (enter(given[0], group), *given[1:]))
            mixer.register_forward_hook(lambda _module, _given, y_BTD: leave(y_BTD, group))
    split = shared(graph, model.graph)
    for node, sublayer in model.sublayers():
        for (path, _, _), mixer in zip(node.branches(), sublayer.mixer_modules()):
            if path in split:
                mixer.averaged = partial(_averaged, group=group, ranks=ranks, rank=rank)
            if split.get(path):
                mixer.summed = partial(_total, group=group)
    found.update(_norms(model, found, ranks))
    return {path: held for path, held in found.items() if held is not None and path in model.weights}


def _drop(model: Model, path: str) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, None)
    del model.weights[path]


def _norms(model: Model, found: dict[str, Slice | None], ranks: int) -> dict[str, Slice]:
    """Norms that the parts of mixers compute have partial gradients too."""
    leaves: dict[str, set[bool]] = {}
    for node, sublayer in model.sublayers():
        if any(path.startswith(f"{node.owner}.mixer.") for path in found):
            leaves.setdefault(node.owner, set()).add(sublayer.leaves_norm)
    if mixed := [owner for owner, ways in leaves.items() if len(ways) > 1]:
        raise ValueError(
            f"`{mixed[0]}` leaves its norm to a part in some of its uses only, which tensor ranks cannot share: "
            "take another part set"
        )
    normed = tuple(f"{owner}.norm." for owner, ways in leaves.items() if True in ways)
    return {path: same(w, ranks) for path, w in model.weights.items() if path.startswith(normed)} if normed else {}


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(y, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole, as each part reads it; backwards, the sum of the parts' gradients."""
    return _Enter.apply(x, group)


def leave(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the parts; backwards, each part has the whole's gradient."""
    return _Leave.apply(y, group)


def _total(y: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The sum of the parts, as each part reads it."""
    return enter(leave(y, group), group)


def _averaged(x: Tensor, *, group: dist.ProcessGroup, ranks: int, rank: int, among: int | None = None) -> Tensor:
    """The mean over so many neighbours (None: over all); each set of neighbours has a place of its own in one sum."""
    among = among or ranks
    nothing, mine = torch.zeros_like(x), rank // among
    places = torch.stack([x if place == mine else nothing for place in range(ranks // among)])
    return _total(places, group=group)[mine] / among


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))
