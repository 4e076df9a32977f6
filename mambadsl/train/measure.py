"""What each layer of a model takes on this device, as the planner's file of measured times has it (plan/device.py).

In: a graph, a device, the microbatch, what layers compute in and which parts run. Out: a frozen `Measurement`. Each
layer runs as a stage of its own, once for all that are equal: forward and backward in training mode, its gradients
added to float32 sums as several microbatches do. The `mtp` tail is measured with the head, whose weights it reads.
Refuses (MdlError) what cannot be built, (ValueError) what the device has no memory for.

Under torchrun all processes measure, and what the first two find of each other is in the file as well: what the link
carries, and how much longer layers take while the first waits for something from the second, as ranks of a pipeline do.

A layer keeps, from its forward to its backward, what is there after the forward and was not before: what autograd saved
and what it gives, not what it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mambadsl.build.device import device as usable
from mambadsl.build.init import initialise
from mambadsl.build.loss import counts
from mambadsl.build.machine import machine
from mambadsl.build.model import DTYPES, Model
from mambadsl.build.refuse import problems
from mambadsl.build.stage import Stage, stages
from mambadsl.graph.cost import costs
from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.plan.assign import Assignment, assign
from mambadsl.plan.device import DEVICES, MOST_BESIDE, LayerTime
from mambadsl.plan.from_graph import units
from mambadsl.text.diagnostic import MdlError
from mambadsl.train.clock import Clock
from mambadsl.train.machine import Speeds, awaiting, speeds
from mambadsl.train.memory import full, memory
from mambadsl.train.pieces import Piece, between, compile_layers, own
from mambadsl.train.settings import TOKENS, ran
from mambadsl.train.vocabulary import share
from mambadsl.train.world import World, opened, size_of_world

#: Passes before the first that counts, and those that count: as many as fit into the time, within limits.
WARM, LEAST, MOST, SECONDS = 3, 5, 20, 0.4
#: A pass for input gradients alone that takes this part of the whole has computed the weights' as well, as fused
#: backwards do: then FLOPs say how the whole is split.
TOGETHER = 0.9


@dataclass(frozen=True, slots=True)
class Measured:
    """Equal layers. kind: the first's. split: how the backward pass was: "measured", "flops", or "none" where nothing
    comes in that has a gradient. beside_s: of forward and backward while a transfer waits; None for one process."""

    kind: str
    paths: tuple[str, ...]
    time: LayerTime
    split: str
    beside_s: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """base: the planner's device that the rest is taken from. device, ran (how layers did): in words. rows: in the
    model's order."""

    base: str
    device: str
    ran: str
    microbatch_tokens: int
    speeds: Speeds
    rows: tuple[Measured, ...]

    @property
    def layers(self) -> tuple[LayerTime, ...]:
        """By kind for the most frequent sort of each, by path for the others."""
        usual = {}
        for row in self.rows:
            if row.kind not in usual or len(row.paths) > len(usual[row.kind].paths):
                usual[row.kind] = row
        found = []
        for row in self.rows:
            for name in (row.kind,) if usual[row.kind] is row else row.paths:
                found.append(LayerTime(name, *(getattr(row.time, key) for key in LayerTime.__slots__[1:])))
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """The file that the planner reads."""
        known = {name: value for name, value in asdict(self.speeds).items() if value is not None}
        layers = {}
        for time in self.layers:
            facts = {key: value for key, value in asdict(time).items() if value is not None}
            layers[facts.pop("name")] = facts
        return {
            "base": self.base, "name": f"{self.device}, measured", **known,
            "microbatch_tokens": self.microbatch_tokens, "layers_ran": self.ran, "layers": layers,
        }


def measure(
    graph: LayerGraph, *, device: Any = "cpu", dtype: str = "fp32", parts: str = "auto", length: int | None = None,
    sequences: int = 1, compile: bool = False, recompute: bool = False, tensor: int = 1,
    tell: Callable[[str], None] = lambda words: None,
) -> Measurement:
    """length: tokens of a sequence (default: the model's context). sequences: of a microbatch. compile, recompute: as
    training has them; rows are of one document each. tensor: ranks that share each layer; what one of them has is
    measured, without what they send. tell: of each layer before it is measured."""
    length = graph.model.context if length is None else length
    for name, given in ("length", length), ("sequences", sequences):
        if given < 1:
            raise ValueError(f"{name} must be at least 1, not {given}")
    if sequences * length > TOKENS:
        raise ValueError(f"{sequences:,} x {length:,} tokens are more than are measured at once: {TOKENS:,}")
    if found := problems(graph):
        raise MdlError(found)
    mine = own(graph, recompute=recompute, tensor=tensor)
    how = ran(dtype=dtype, parts=parts, compile=compile, recompute=recompute, tensor=tensor)
    with opened(usable(device), stages=size_of_world()) as world:
        return _measure(mine, graph.model.vocab, world, dtype, parts, (sequences, length), compile, how, tell)


def _measure(
    graph: LayerGraph, vocab: int, world: World, dtype: str, parts: str, shape: tuple[int, int], compile: bool,
    how: str, tell: Callable[[str], None],
) -> Measurement:
    sequences, length = shape
    # A tensor's device has its number, which torch wants when asked for memory.
    place = torch.empty(0, device=world.device).device
    world = replace(world, device=place)
    where = machine(place)
    assignment = assign(graph, parts=parts, machine=where, dtype=dtype)
    base = next((name for name in DEVICES if where.name and name in where.name.lower()), None)
    base = base or ("h200" if place.type == "cuda" else "cpu")
    kinds = {unit.path: unit.kind for unit in units(graph, device=DEVICES[base], length=length, sequences=sequences)}
    flops = {path: cost.flops for path, cost in costs(graph, length=length).items()}
    bench = _Bench(graph, vocab, assignment, world, dtype, shape, compile)
    found, rows = speeds(world, DTYPES[dtype], sent=bench.sent), []
    for stage, alike in _sorts(graph, assignment):
        first, path = stage.nodes[0], stage.nodes[0].path
        tell(f"{kinds[path]} ({path}{f' and {len(alike) - 1} more' * (len(alike) > 1)})")
        try:
            forward, inputs, whole, beside, kept, working = bench.run(stage)
        except RuntimeError as error:
            if not full(error):
                raise
            raise ValueError(
                f"`{path}` with {sequences} x {length:,} tokens does not fit into the memory of {place}: measure fewer "
                "sequences or a shorter length"
            ) from None
        by = "none" if inputs is None else "measured" if inputs <= TOGETHER * whole else "flops"
        if by == "flops":
            part = flops[path].backward_input / flops[path].backward if flops[path].backward else 1
            inputs = whole * float(part)
        inputs = inputs or 0.0
        time = LayerTime(path, forward, inputs, whole - inputs, kept, working)
        rows.append(Measured(kinds[path], alike, time, by, beside))
        # The head's time has the tail's.
        rows += [Measured(kinds[n.path], (n.path,), LayerTime(n.path, 0, 0, 0, 0, 0), "none") for n in stage.tail
                 if n is not first]
    found = replace(found, beside_transfer=_beside(rows))
    return Measurement(base, where.name or "CPU", how, sequences * length, found, tuple(rows))


def _beside(rows: list[Measured]) -> float | None:
    """How many times longer all layers take while a transfer waits."""
    beside = sum(len(row.paths) * row.beside_s for row in rows if row.beside_s is not None)
    alone = sum(
        len(row.paths) * (row.time.forward_s + row.time.backward_input_s + row.time.backward_weight_s)
        for row in rows if row.beside_s is not None
    )
    return min(max(1.0, beside / alone), MOST_BESIDE) if alone else None


def _sorts(graph: LayerGraph, assignment: Assignment) -> Iterator[tuple[Stage, tuple[str, ...]]]:
    """Of layers that do the same, the first as a stage, and the paths of all."""
    body, tail = [n for n in graph.nodes if not n.tail], [n.path for n in graph.nodes if n.tail]
    cut = stages(graph, [*([node.path] for node in body[:-1]), [body[-1].path, *tail]])
    found: dict[tuple, list[Stage]] = {}
    for stage in cut:
        node = stage.nodes[0]
        what = *_what(node, assignment), graph.streams[node.path], stage.takes, stage.gives
        found.setdefault(what, []).append(stage)
    for alike in found.values():
        yield alike[0], tuple(stage.nodes[0].path for stage in alike)


def _what(node: Node, assignment: Assignment) -> tuple:
    if node.layer is None:
        return node.role, None, ()
    filled = (assignment.of(path).values() for path, _, _ in node.branches())
    return node.role, node.layer, tuple((c.slot, c.text) for choices in filled for c in choices)


class _Bench:
    """Runs a stage of one layer on made-up inputs: B rows of T tokens, each one document."""

    def __init__(
        self, graph: LayerGraph, vocab: int, assignment: Assignment, world: World, dtype: str, shape: tuple[int, int],
        compile: bool,
    ):
        """vocab: of the whole model."""
        self.graph, self.vocab, self.assignment, self.compile, self.world = graph, vocab, assignment, compile, world
        self.device = device = world.device
        self.made, self.clock = dict(dtype=DTYPES[dtype], device=device), Clock(device)
        widest = max(streams.given for streams in graph.streams.values())
        stream, narrow = between(graph, DTYPES[dtype], streams=widest)["x"]
        self.sent = math.prod((*shape, *stream)) * narrow.itemsize
        self.tokens_BT = torch.randint(graph.model.vocab, shape, device=device)

    def run(self, stage: Stage) -> tuple[float, float | None, float, float | None, int, int]:
        """Seconds of the forward, of the backward for inputs alone (None if there are none), of the whole backward, of
        both while a transfer waits (None for one process); bytes kept in between, and needed on top."""
        model = initialise(Model(self.graph, stage, self.assignment, **self.made))
        # As of several tensor ranks, of which the others are not here.
        share(model, vocab=self.vocab, group=self.world.group("tensor"))
        made = Piece(model, {}).train()
        made.counts_K = counts(self.tokens_BT, depths=model.trained_depths)
        #: Of what the stage takes, by name: what comes after batch and time, and the dtype.
        self.taken = between(self.graph, self.made["dtype"], streams=self.graph.streams[stage.paths[0]].read)
        self.inputs = tuple(map(self._input, stage.takes))
        self.sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in made.parameters() if p.dtype != torch.float32}
        self.roots = [torch.randn_like(x) if x.dim() else None for x in self._forward(made)]
        # On a CPU tensors are counted operator by operator, which compiled layers do not have.
        early = self._memory(made) if self.device.type != "cuda" else None
        if self.compile:
            compile_layers(model)
        kept, working = early or self._memory(made)
        whole = self._times(made, self._backward)
        floats = [x for x in self.inputs if x.requires_grad]
        alone = self._times(made, lambda made, out: torch.autograd.grad(out, floats, self.roots)) if floats else None
        beside = None
        if self.world.size > 1:
            with awaiting(self.world, self.sent):
                beside = sum(self._times(made, self._backward))
        return whole[0], alone and alone[1], whole[1], beside, kept, working

    def _input(self, name: str) -> Tensor:
        if name == "tokens":
            return self.tokens_BT
        (batch, length), (shape, dtype) = self.tokens_BT.shape, self.taken[name]
        length += self.graph.model.meta_tokens
        return torch.randn(batch, length, *shape, dtype=dtype, device=self.device, requires_grad=True)

    def _forward(self, made: Piece) -> tuple[Tensor, ...]:
        given = made(*self.inputs, targets_BT=self.tokens_BT)
        return given if isinstance(given, tuple) else (given,)

    def _backward(self, made: Piece, out: tuple[Tensor, ...]) -> None:
        torch.autograd.backward(out, self.roots)
        for p, total in self.sums.items():
            if p.grad is not None:
                total += p.grad
                p.grad = None
        for x in self.inputs:
            x.grad = None

    def _times(self, made: Piece, backward: Callable[[Piece, tuple[Tensor, ...]], Any]) -> tuple[float, float]:
        """Medians of the forward and the backward. The host runs ahead of the device, as in training."""
        mark, found = self.clock.mark, []

        def once() -> None:
            begun = mark()
            out = self._forward(made)
            turned = mark()
            backward(made, out)
            found.append((begun, turned, mark()))

        for _ in range(WARM):
            once()
        seconds = self.clock.between(found[-1][0], found[-1][2])
        found.clear()
        for _ in range(max(LEAST, min(MOST, int(SECONDS / max(seconds, 1e-9))))):
            once()
        spans = [(self.clock.between(a, b), self.clock.between(b, c)) for a, b, c in found]
        return median(a for a, _ in spans), median(b for _, b in spans)

    def _memory(self, made: Piece) -> tuple[int, int]:
        """Bytes kept between forward and backward, and those needed on top while the two run."""
        self._backward(made, self._forward(made))
        with memory(self.device) as used:
            out = self._forward(made)
            kept = used.held
            # What only passes through is copied where stages end, not between layers.
            stage = made.model.stage
            through = [x for name, x in zip(stage.gives, out) if name in stage.takes and name not in ("x", "t")]
            kept -= sum(x.numel() * x.element_size() for x in through)
            del through
            kept -= self._copied(stage)
            self._backward(made, out)
            return kept, max(0, used.most - kept)

    def _copied(self, stage: Stage) -> int:
        """Bytes of states of blocks that are copied where stages meet, not between layers."""
        if not self.graph.blocks or "x" not in stage.takes:
            return 0
        (read, given), x = self.graph.streams[stage.paths[0]], self.inputs[stage.takes.index("x")]
        copies = given - 1 + (read if read > 1 else 0)
        return copies * x.numel() // read * x.element_size()
