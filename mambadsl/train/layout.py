"""Where the trainer keeps which weight, and what a rank of the pipeline then holds at its worst moment, and spends
besides its layers.

`sharding.shard` decides; tests hold this to what pieces really have. In: a graph as one tensor rank has it, settings,
the planner's units. Out: bytes and seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mambadsl.graph.cost import NARROW, WIDE
from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.graph.weights import node_weights
from mambadsl.kinds.kind import Weight
from mambadsl.plan.device import Device
from mambadsl.plan.schedule import BACKWARD_INPUT, FORWARD, Action
from mambadsl.plan.unit import Unit
from mambadsl.train.settings import Settings
from mambadsl.train.sharding import regathers, together

#: Bytes moved for each weight on a rank by one update: AdamW reads weight, gradient and two moments and writes all but
#: the gradient, in one pass where it is fused, in nine where it is not; the norm reads the gradients, clipping also
#: writes them.
UPDATED = {True: 28 + 12, False: 80 + 12}
#: Bytes moved for each weight of a layer, not only the rank's rows, to make the copy that layers compute in, and to
#: put its gradient into the buffer that is reduced and out again; over one data rank, over several.
COPIED, REDUCED = (10, 8), (24, 12)
MOMENTS = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """data: ranks that share the rows."""

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
        return regathers(self.settings, data=self.data)

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

    def rows(self, weight: Weight, at: int) -> int:
        """Elements on the data rank `at`: whole rows, as many on all but the last ones."""
        if not self.cut(weight):
            return weight.elements
        whole = weight.shape[0]
        each = -(-whole // self.data)
        return weight.elements // whole * max(0, min(each, whole - at * each))


class Place:
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
            gathered = {path: w.elements for path, w in mine.items() if layout.cut(w)}
            sizes = {o: sum(n for path, n in gathered.items() if path.startswith(f"{o}.")) for o in alone}
            self.layers += [sum(map(sizes.__getitem__, group)) for group in together(sizes)]
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
            s: WIDE * sum(w.elements if layout.sums else layout.rows(w, at) for w in mine.values() if w.trained)
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
        times = 2 * microbatches if layout.regathers else 1
        many = data > 1
        copies = gathered * (times * COPIED[many] + REDUCED[many]) / device.bytes_per_s
        if not many:
            return copies, 0.0, update
        part = (data - 1) / data / device.link_bytes_per_s
        collectives = (times + 1) * (len(self.layers) + 1) * device.link_latency_s
        link = gathered * part * (times * layout.narrow + WIDE) + collectives
        whole = sum(w.elements for w in self._all if w.trained and not layout.cut(w))
        # Nothing hides the first that is gathered and the last that is reduced; a pipeline's, none of either.
        bare = self.frame * part * (layout.narrow + WIDE) if layout.settings.stages == 1 else link
        return copies, max(bare, link - layers_s) + 2 * whole * WIDE * part, update
