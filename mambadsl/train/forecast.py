"""What a run will hold on each rank and how long a step will take, before any of it is there.

In: a graph, settings, the number of ranks, the planner's device and, of a pipeline, the plan. Out: a frozen `Forecast`.
It follows what the trainer does: weights, gradients and moments in float32, cut by rows over the data ranks (where
layers compute in less, weights declared float32 are whole on each); copies that layers compute with, of all layers or,
gathered anew for each pass, of a few; gradients of several microbatches summed whole; activations of the microbatches
in flight.

Times are those of the plan, or of all layers in a row, and what a step takes besides: copies and reductions at the
device's bytes per second, what goes over the link and is not hidden behind layers, the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mambadsl.graph.cost import costs, total
from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.plan import device as devices
from mambadsl.plan.device import Device
from mambadsl.plan.from_graph import LOGITS, units
from mambadsl.plan.plan import Plan, Spent
from mambadsl.plan.schedule import BACKWARD, FORWARD, Action, rank_of
from mambadsl.plan.unit import Unit
from mambadsl.train.layout import Layout, Place
from mambadsl.train.peak import peak_of
from mambadsl.train.pieces import own
from mambadsl.train.settings import Settings, ran


@dataclass(frozen=True, slots=True)
class Held:
    """What ranks that are alike hold, in bytes unless it says otherwise. ranks: in the run. stages: of the pipeline.

    params: trained elements, the rank's rows only. copies: of weights, as layers compute with them. gradients: the
    most there are. activations: of all microbatches in flight. buffers: received from other stages. working: of the
    layer that needs most on top. peak: at the worst moment, which is less than the sum where gradients come only as
    activations go."""

    ranks: tuple[int, ...]
    stages: tuple[int, ...]
    params: int
    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    working: int
    peak: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """mesh: (pipeline, data, tensor) ranks. rows, microbatch_rows, microbatches: of a data rank, in a step.

    step_s: layers_s, forwards and backwards as the pipeline runs them; copies_s, making what layers compute in and
    reducing gradients; link_s, what of the data ranks' traffic is not hidden; optimizer_s. bubble: of layers_s.
    spent: on a pipeline's actions.
    peak_share: of what the devices' maker states; None where that is not known. measured: layer times are from a file;
    doubt: what that file's are of, if not of layers as this run has them.
    """

    device: str
    measured: bool
    mesh: tuple[int, int, int]
    rows: int
    microbatch_rows: int
    microbatches: int
    tokens: int
    step_s: float
    layers_s: float
    copies_s: float
    link_s: float
    optimizer_s: float
    bubble: float
    tokens_per_s: float
    peak_share: float | None
    memory_limit: int
    held: tuple[Held, ...]
    spent: tuple[Spent, ...] = ()
    doubt: str | None = None

    @property
    def too_large(self) -> tuple[Held, ...]:
        """Ranks that do not fit."""
        return tuple(held for held in self.held if held.peak > self.memory_limit)

    def of(self, rank: int) -> Held:
        return next(held for held in self.held if rank in held.ranks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def chain(graph: LayerGraph, settings: Settings, *, data: int, device: Device) -> tuple[Unit, ...]:
    """The planner's units for this trainer, on so many data ranks; measured times in place where the device has them,
    which are then of layers as a tensor rank has them. MdlError (E821) if they are for another microbatch."""
    _, micro = settings.rows(data)
    layout, part = Layout(settings, data), own(graph, recompute=settings.recompute, tensor=settings.tensor)
    found = units(
        part, device=device, length=settings.length, sequences=micro, narrow=layout.narrow,
        bytes_per_param=layout.bytes_per_param,
    )
    found = devices.measured(found, device, microbatch_tokens=micro * settings.length)
    if settings.tensor == 1:
        return found
    # What the parts of a layer give is added up, and in the backward what they ask of the stream. Of the vocabulary's
    # parts, the embedding has the first and the head the second; what the loss adds up is next to nothing.
    model, tokens = graph.model, micro * (settings.length + graph.model.meta_tokens)
    size = tokens * model.d_model * layout.narrow
    sent = 2 * (settings.tensor - 1) / settings.tensor * size / device.link_bytes_per_s + device.link_latency_s
    shared = {
        node.path for node, mine in zip(graph.nodes, part.nodes)
        if node.layer is not None and node.layer.branches != mine.layer.branches
    }
    ends = graph.nodes if model.vocab != part.model.vocab else ()
    forward = shared | {node.path for node in ends if node.role is Role.EMBED}
    backward = shared | {node.path for node in ends if node.role in LOGITS}
    return tuple(
        replace(
            u, forward_s=u.forward_s + sent * (u.path in forward),
            backward_input_s=u.backward_input_s + sent * (u.path in backward),
        )
        for u in found
    )


def forecast(
    graph: LayerGraph, settings: Settings, *, ranks: int, device: str | Device = "h200", plan: Plan | None = None,
    memory_limit: int | None = None, fused: bool = True,
) -> Forecast:
    """graph: the whole model. plan: of the pipeline, made from `chain`. memory_limit: bytes a rank (default: what the
    device leaves). fused: the optimizer's update is (on GPUs). ValueError for ranks, rows and layers that cannot be
    shared out, MdlError (E820, E821) for the device."""
    where = devices.device(device)
    data = ranks // (settings.stages * settings.tensor)
    each, micro = settings.rows(data)
    count, layout = each // micro, Layout(settings, data)
    part = own(graph, recompute=settings.recompute, tensor=settings.tensor)
    by_path = {unit.path: unit for unit in chain(graph, settings, data=data, device=where)}
    places = [Place(part, layout, by_path, stages, order) for stages, order in _stages(graph, plan, count)]
    alike: dict[tuple, list[int]] = {}
    for place, p in enumerate(places):
        buffers = sum(plan.stages[s].buffer_bytes for s, _ in p.stages) if plan else 0
        found = [p.held(at, buffers) for at in range(data)]
        for at, facts in enumerate(found):
            first = (place * data + at) * settings.tensor
            alike.setdefault((tuple(s for s, _ in p.stages), *facts), []).extend(range(first, first + settings.tensor))
    layers_s = plan.step_s if plan else count * sum(unit.total_s for unit in by_path.values())
    besides = [p.seconds(where, count, layers_s, fused) for p in places]
    copies, link, update = max(besides, key=sum)
    step = layers_s + copies + link + update
    tokens = settings.batch * settings.length
    flops = total(costs(graph, length=settings.length)).flops
    peak = peak_of(where.name, settings.dtype)
    return Forecast(
        device=where.name, measured=bool(where.layer_times), mesh=(settings.stages, data, settings.tensor), rows=each,
        microbatch_rows=micro, microbatches=count, tokens=tokens, step_s=step, layers_s=layers_s, copies_s=copies,
        link_s=link, optimizer_s=update, bubble=plan.bubble if plan else 0.0, tokens_per_s=tokens / step,
        peak_share=float(flops.forward + flops.backward) * tokens / step / (peak * ranks) if peak else None,
        memory_limit=where.memory_limit if memory_limit is None else memory_limit,
        held=tuple(Held(tuple(ranks), *facts) for facts, ranks in alike.items()), spent=plan.spent if plan else (),
        doubt=_doubt(where, settings),
    )


def _doubt(where: Device, settings: Settings) -> str | None:
    mine = ran(
        dtype=settings.dtype, parts=settings.parts, compile=settings.compile, recompute=settings.recompute,
        tensor=settings.tensor,
    )
    if where.layers_ran in ("", mine):
        return None
    return f"the times of `{where.name}` are of layers that ran otherwise: {where.layers_ran}; here {mine}"


def _stages(
    graph: LayerGraph, plan: Plan | None, microbatches: int
) -> Iterator[tuple[list[tuple[int, tuple[str, ...]]], Sequence[Action]]]:
    """Of each rank of the pipeline: its stages with their paths, and what it runs in order."""
    if plan is None:
        order = [Action(kind, 0, mb) for mb in range(microbatches) for kind in (FORWARD, BACKWARD)]
        yield [(0, tuple(node.path for node in graph.nodes))], order
        return
    for rank, order in enumerate(plan.orders()):
        mine = [s for s in plan.stages if rank_of(plan.placement, plan.ranks, s.index) == rank]
        yield [(s.index, s.paths) for s in mine], order
