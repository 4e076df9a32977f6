"""What a run will hold on each rank and how long a step will take, before any of it is there.

In: a graph, settings, the number of ranks, the planner's device and, of a pipeline, the plan. Out: a frozen `Forecast`.
It follows what the trainer does: weights, gradients and moments in float32, cut by rows over the data ranks (weights
declared float32 are whole on each); copies that layers compute with, of all layers or, gathered anew for each pass, of
a few; gradients of several microbatches summed whole; activations of the microbatches in flight.

Times are those of the plan, or of all layers in a row, and what a step takes besides: copies and reductions at the
device's bytes per second, what goes over the link and is not hidden behind layers, the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mambadsl.graph.cost import NARROW, WIDE, costs, total
from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.graph.weights import node_weights
from mambadsl.kinds.kind import Weight
from mambadsl.plan import device as devices
from mambadsl.plan.device import Device
from mambadsl.plan.from_graph import units
from mambadsl.plan.plan import Plan
from mambadsl.plan.schedule import BACKWARD, BACKWARD_INPUT, FORWARD, Action, rank_of
from mambadsl.plan.unit import Unit
from mambadsl.train.peak import peak_of
from mambadsl.train.settings import Settings

#: Bytes moved for each weight on a rank by one update: AdamW reads weight, gradient and two moments and writes all but
#: the gradient, in one pass where it is fused, in nine where it is not; the norm reads the gradients, clipping also
#: writes them.
UPDATED = {True: 28 + 12, False: 80 + 12}
#: Bytes moved for each weight of a layer, not only the rank's rows, to make the copy that layers compute in, and to
#: put its gradient into the buffer that is reduced and out again; over one data rank, over several.
COPIED, REDUCED = (10, 8), (24, 12)
MOMENTS = 2


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
    peak_share: of what the devices' maker states; None where that is not known. measured: layer times are from a file.
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

    @property
    def too_large(self) -> tuple[Held, ...]:
        """Ranks that do not fit."""
        return tuple(held for held in self.held if held.peak > self.memory_limit)

    def of(self, rank: int) -> Held:
        return next(held for held in self.held if rank in held.ranks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def chain(graph: LayerGraph, settings: Settings, *, data: int, device: Device) -> tuple[Unit, ...]:
    """The planner's units for this trainer, on so many data ranks; measured times in place where the device has them.
    MdlError (E821) if they are for another microbatch."""
    _, micro = settings.rows(data)
    layout = Layout(settings, data)
    found = units(
        graph, device=device, length=settings.length, sequences=micro, narrow=layout.narrow,
        bytes_per_param=layout.bytes_per_param,
    )
    found = devices.measured(found, device, microbatch_tokens=micro * settings.length)
    if settings.tensor == 1:
        return found
    return tuple(map(_shared(settings.tensor), found))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the trainer keeps which weight (`pieces.shard` decides; a test holds this to it)."""

    settings: Settings
    data: int

    @property
    def narrow(self) -> int:
        """Bytes of an element that layers compute in."""
        return WIDE if self.settings.dtype == "fp32" else NARROW

    @property
    def sharded(self) -> bool:
        return self.data > 1 or self.narrow != WIDE

    @property
    def regathers(self) -> bool:
        """Whether a pass gathers what it needs and lets it go."""
        return self.data > 1 and self.settings.stages == 1

    @property
    def sums(self) -> bool:
        """Whether gradients of a step are summed whole before they are cut."""
        each, micro = self.settings.rows(self.data)
        return self.settings.stages > 1 or each > micro

    @property
    def bytes_per_param(self) -> float:
        """Of a pipeline's rank: its rows of the weight and the moments, the copy, the gradient's sum."""
        return (1 + MOMENTS) * WIDE / self.data + WIDE + self.narrow * self.sharded

    def cut(self, weight: Weight) -> bool:
        return self.sharded and weight.trained and not (weight.fp32 and self.narrow != WIDE)

    def elements(self, weight: Weight) -> int:
        """On each tensor rank, before the data ranks share them."""
        return weight.elements // (1 if weight.tp == "none" else self.settings.tensor)

    def rows(self, weight: Weight, at: int) -> int:
        """Elements on the data rank `at`: whole rows, as many on all but the last ones."""
        count, whole = self.elements(weight), weight.shape[0]
        if not self.cut(weight):
            return count
        if weight.tp in ("out", "heads", "expert"):
            whole //= self.settings.tensor
        each = -(-whole // self.data)
        return count // max(1, whole) * max(0, min(each, whole - at * each))


def forecast(
    graph: LayerGraph, settings: Settings, *, ranks: int, device: str | Device = "h200", plan: Plan | None = None,
    memory_limit: int | None = None, fused: bool = True,
) -> Forecast:
    """graph: with `recompute` where the run has it. plan: of the pipeline, made from `chain`. memory_limit: bytes a
    rank (default: what the device leaves). fused: the optimizer's update is (on GPUs). ValueError for ranks and rows
    that cannot be shared out, MdlError (E820, E821) for the device."""
    where = devices.device(device)
    data = ranks // (settings.stages * settings.tensor)
    each, micro = settings.rows(data)
    count, layout = each // micro, Layout(settings, data)
    by_path = {unit.path: unit for unit in chain(graph, settings, data=data, device=where)}
    places = [_Place(graph, layout, by_path, stages, order) for stages, order in _stages(graph, plan, count)]
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
        held=tuple(Held(tuple(ranks), *facts) for facts, ranks in alike.items()),
    )


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


class _Place:
    """A rank of the pipeline, or the one that has the whole model."""

    def __init__(
        self, graph: LayerGraph, layout: Layout, units: dict[str, Unit], stages: list[tuple[int, tuple[str, ...]]],
        order: Sequence[Action],
    ):
        self.layout, self.stages, self.order = layout, stages, order
        self.units = {index: [units[path] for path in paths] for index, paths in stages}
        self.weights: dict[int, dict[str, Weight]] = {}
        #: Of each stage, what FSDP gathers at once: each layer's elements, and the rest's.
        self.layers, self.frame = [], 0
        for index, paths in stages:
            nodes = [graph.by_path[path] for path in paths]
            mine = {path: weight for node in nodes for path, weight in node_weights(graph, node)}
            self.weights[index] = mine
            uses = [node.owner for node in nodes if node.role is Role.LAYER]
            alone = [owner for owner in uses if uses.count(owner) == 1 and owner in paths]
            gathered = {path: layout.elements(w) for path, w in mine.items() if layout.cut(w)}
            sizes = {o: sum(n for path, n in gathered.items() if path.startswith(f"{o}.")) for o in alone}
            self.layers += sizes.values()
            self.frame += sum(gathered.values()) - sum(sizes.values())

    @property
    def _all(self) -> list[Weight]:
        return [w for mine in self.weights.values() for w in mine.values()]

    def held(self, at: int, buffers: int) -> tuple[int, ...]:
        """The fields of `Held` from `params` on, of the data rank `at`."""
        layout, trained = self.layout, [w for w in self._all if w.trained]
        params = sum(layout.rows(w, at) for w in trained)
        weights = WIDE * (params + sum(w.elements for w in self._all if not w.trained))
        optimizer = MOMENTS * WIDE * params
        copies = self._copies()
        summed = {
            s: WIDE * sum(layout.elements(w) if layout.sums else layout.rows(w, at) for w in mine.values() if w.trained)
            for s, mine in self.weights.items()
        }
        activations, most = self._moments(summed)
        peak = max(
            weights + optimizer + copies + buffers + most,
            weights + optimizer + WIDE * params + buffers,
        )
        working = max(u.working_bytes for mine in self.units.values() for u in mine)
        return (params, weights, copies, sum(summed.values()), optimizer, activations, buffers, working, peak)

    def _copies(self) -> int:
        if not self.layout.sharded:
            return 0
        if not self.layout.regathers:
            return self.layout.narrow * (self.frame + sum(self.layers))
        # The layer that computes, and the next one, gathered ahead.
        return self.layout.narrow * (self.frame + 2 * max(self.layers, default=0))

    def _moments(self, summed: dict[int, int]) -> tuple[int, int]:
        """The most bytes of activations at once, and of activations, gradients and working memory together. Layers need
        most on top in their backward, when those after them have let go of what they kept; in the first one of a stage
        its gradients come meanwhile."""
        live, most_live, most, gone = 0, 0, 0, set()
        for kind, stage, _ in self.order:
            here, own = self.units[stage], sum(u.activation_bytes for u in self.units[stage])
            if kind == FORWARD:
                live += own
                most_live, most = max(most_live, live), max(most, live + sum(summed[s] for s in gone))
                continue
            params = sum(u.params + u.shared_params for u in here) or 1
            new = 0 if stage in gone else summed[stage] / params
            now = live + sum(summed[s] for s in gone)
            for unit in reversed(here):
                most = max(most, int(now + unit.working_bytes))
                now += new * (unit.params + unit.shared_params)
                most = max(most, int(now))
                now -= 0 if kind == BACKWARD_INPUT else unit.activation_bytes
            live -= 0 if kind == BACKWARD_INPUT else own
            gone.add(stage)
        return most_live, most

    def seconds(self, device: Device, microbatches: int, layers_s: float, fused: bool) -> tuple[float, float, float]:
        """Of a step besides its layers: copies and reductions, the link, the optimizer."""
        layout, data = self.layout, self.layout.data
        local = sum(layout.rows(w, 0) for w in self._all if w.trained)
        update = local * UPDATED[fused] / device.bytes_per_s
        if not layout.sharded:
            return 0.0, 0.0, update
        gathered = self.frame + sum(self.layers)
        times = 1 if layout.settings.stages > 1 else microbatches * (2 if layout.regathers else 1)
        many = data > 1
        copies = gathered * (times * COPIED[many] + REDUCED[many]) / device.bytes_per_s
        if not many:
            return copies, 0.0, update
        part = (data - 1) / data / device.link_bytes_per_s
        collectives = (times + 1) * (len(self.layers) + 1) * device.link_latency_s
        link = gathered * part * (times * layout.narrow + WIDE) + collectives
        whole = sum(layout.elements(w) for w in self._all if w.trained and not layout.cut(w))
        # Nothing hides the first that is gathered and the last that is reduced; a pipeline's, none of either.
        bare = self.frame * part * (layout.narrow + WIDE) if layout.settings.stages == 1 else link
        return copies, max(bare, link - layers_s) + 2 * whole * WIDE * part, update


def _shared(tensor: int):
    """A unit on one of so many tensor ranks: its work and what it keeps are shared. The stream is whole on each."""
    from dataclasses import replace

    def one(unit: Unit) -> Unit:
        return replace(
            unit, forward_s=unit.forward_s / tensor, backward_input_s=unit.backward_input_s / tensor,
            backward_weight_s=unit.backward_weight_s / tensor, static_bytes=unit.static_bytes // tensor,
            shared_bytes=unit.shared_bytes // tensor, activation_bytes=unit.activation_bytes // tensor,
            working_bytes=unit.working_bytes // tensor,
        )

    return one
