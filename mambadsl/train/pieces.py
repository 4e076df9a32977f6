"""What one rank trains: a stage of the model, or the whole of it, sharded over the data ranks.

In: a graph, a stage, the world. Out: a `Piece`, a module with the stage's model below `model`, weights and all. Every
weight is drawn by its path and only what this rank has of it is kept, so any layout begins with the same bits. FSDP2
holds weights in float32 and gathers them, some layers at a time, in what layers compute in; where that is less than
float32, weights declared float32 are whole on every data rank, and so are their gradients (`gradients.py` adds them
up).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mambadsl.build.compiled import compiled, limits
from mambadsl.build.init import drawn
from mambadsl.build.machine import machine
from mambadsl.build.model import Model
from mambadsl.build.refuse import problems
from mambadsl.build.stage import Stage
from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.graph.weights import all_weights
from mambadsl.plan.assign import assign
from mambadsl.text.diagnostic import MdlError
from mambadsl.train.deferred import Deferred, defer
from mambadsl.train.held import boxes
from mambadsl.train.settings import Settings
from mambadsl.train.sharding import shard
from mambadsl.train.slices import Slice, split
from mambadsl.train.tensor import join
from mambadsl.train.vocabulary import share
from mambadsl.train.world import World


class Piece(nn.Module):
    """A stage as a pipeline runs it: tensors in, tensors out; of the last one, its share of the step's loss.

    counts_K: of the step, set before its first microbatch (`Model.share`). slices: path -> what the rank has of the
    weight, of what tensor ranks share. deferred: the gradients of projections' weights, where they are put off.
    """

    def __init__(
        self, model: Model, slices: Mapping[str, Slice] = MappingProxyType({}), deferred: Deferred | None = None
    ):
        super().__init__()
        self.model, self.slices, self.deferred = model, slices, deferred
        self.counts_K: Tensor | None = None

    @property
    def last(self) -> bool:
        return self.model.stage.gives == ("logits",)

    def forward(self, *inputs: Tensor, targets_BT: Tensor, segments_BT: Tensor | None = None) -> Any:
        inputs = tuple(_Edge.apply(t) if t.is_floating_point() else t for t in inputs)
        if self.last:
            return self.model.share(*inputs, targets_BT=targets_BT, counts_K=self.counts_K, segments=segments_BT)
        return tuple(map(_own, self.model(*inputs, segments=segments_BT)))


class _Edge(torch.autograd.Function):
    """What is sent between stages lies in memory of its own without gaps, gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x) if x.is_contiguous() else x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format) if x._is_view() or not x.is_contiguous() else x


def piece(graph: LayerGraph, stage: Stage, world: World, settings: Settings, *, puts_off: bool = False) -> Piece:
    """The rank's piece with its initial values. puts_off: gradients of projections' weights come later (`deferred.py`).
    Raises MdlError: E901, E906, and E902, E907 of the part set; ValueError where tensor ranks can share no layer."""
    if found := problems(graph):
        raise MdlError(found)
    mine = own(graph, recompute=settings.recompute, tensor=settings.tensor)
    here = replace(stage, nodes=tuple(mine.by_path[path] for path in stage.paths))
    assignment = assign(mine, parts=settings.parts, machine=machine(world.device), dtype=settings.dtype)
    model = Model(mine, here, assignment, device="meta")
    made = Piece(model, join(model, graph, world), defer(model, compiles=settings.compile) if puts_off else None)
    share(model, vocab=graph.model.vocab, group=world.group("tensor"))
    if settings.compile:
        compile_layers(model)
    shard(made, world, settings)
    made.to_empty(device=world.device)
    weights = all_weights(graph)
    put(made, drawn({path: weights[path] for path in model.tensors()}, graph, seed=settings.seed))
    return made.train()


def own(graph: LayerGraph, *, recompute: bool, tensor: int) -> LayerGraph:
    """The model as one of so many tensor ranks runs it. ValueError if they can share no layer."""
    return split(recomputed(graph) if recompute else graph, tensor)


def between(
    graph: LayerGraph, dtype: torch.dtype, *, streams: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What may cross between stages beside the tokens, by name: a token's shape and the dtype. dtype: of the layers;
    streams: residual streams where the stages meet."""
    d_model = graph.model.d_model
    stream = torch.float32 if graph.model.residual_dtype == "fp32" else dtype
    given = {
        name: (c.shape, torch.float32 if c.fp32 else dtype)
        for node in graph.nodes for name, c in node.gives(d_model).items()
    }
    beside = {name: ((d_model,), stream) for name in ("x0", "t")}
    return {**given, **beside, "x": ((streams * d_model,), stream)}


def recomputed(graph: LayerGraph) -> LayerGraph:
    """The graph with `recompute` on every layer."""

    def node(n):
        if n.role is not Role.LAYER:
            return n
        return replace(n, layer=replace(n.layer, sub=n.layer.sub.replace(recompute=True)))

    return replace(graph, nodes=tuple(map(node, graph.nodes)))


def compile_layers(model: Model, *, backend: Any = "inductor") -> None:
    """Each layer through torch.compile, from now on."""
    found = compiled(model, backend=backend)
    for name, limit in limits(len(found)).items():
        setattr(torch._dynamo.config, name, limit)
    for sublayer, forward in found.items():
        sublayer.forward = forward


def put(made: Piece, values: Iterable[tuple[str, Tensor]]) -> None:
    """Gives weights and buffers what this rank has of the whole values, by path."""
    tensors = made.model.tensors()
    with torch.no_grad():
        for path, whole in values:
            for box in boxes(tensors[path], made.slices.get(path)):
                box.view.copy_(box.of(whole))
