"""What every picture draws: the folded model, and the lines between its boxes.

In: a graph, and maybe a plan. Out: a `Flow`: nested boxes in running order, each with its pipeline stage
(from the plan, else from the text's `|`), and links between boxes. Boxes do not fold across a stage's border.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.show.describe import kind_text, shape_text
from mambadsl.show.fold import Item, Leaf, fold, leaves

if TYPE_CHECKING:
    from mambadsl.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Link:
    """From one box to another, by their numbers. sort: a tensor's name ("x", "x0", "h", "next"), or "tied",
    "shared" where both have the same weights."""

    source: int
    target: int
    sort: str

    @property
    def carried(self) -> bool:
        """A tensor that is not the residual stream from one box to the next."""
        return self.sort not in ("x", "tied", "shared")

    @property
    def weights(self) -> bool:
        return self.sort in ("tied", "shared")


@dataclass(frozen=True, eq=False)
class Flow:
    """What every picture draws: boxes in groups, and the links between them."""

    graph: LayerGraph
    items: tuple[Item, ...]
    stages: Mapping[str, int] | None

    @cached_property
    def boxes(self) -> tuple[Leaf, ...]:
        return tuple(leaves(self.items))

    def lines(self, box: Leaf) -> list[str]:
        """The words under a box's title: kind, shape, stage."""
        stage = f"stage {box.tag}" if box.tag is not None else ""
        return [text for text in (kind_text(box.node), shape_text(self.graph, box.node), stage) if text]

    @cached_property
    def number(self) -> dict[int, int]:
        """A box's number by `id(box)`."""
        return {id(box): i for i, box in enumerate(self.boxes)}

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Forward only: what goes back to an earlier box is what its group's count says."""
        at = {node.path: i for i, box in enumerate(self.boxes) for node in box.nodes}
        found = {}
        for edge in self.graph.edges:
            source, target = at[edge.source], at[edge.target]
            if source < target:
                found[Link(source, target, edge.tensor)] = None
        if self.graph.tied:
            found[Link(at["embed"], at["head"], "tied")] = None
        last: dict[str, int] = {}
        for i, box in enumerate(self.boxes):
            if box.node.owner.startswith("shared.") and _leads(box.node.owner):
                if box.node.owner in last:
                    found[Link(last[box.node.owner], i, "shared")] = None
                last[box.node.owner] = i
        return tuple(found)

    @property
    def stage_count(self) -> int:
        return 1 + max(self.stages.values()) if self.stages else 1


def flow(graph: LayerGraph, *, plan: Plan | None = None) -> Flow:
    stages = stages_of(graph, plan=plan)
    return Flow(graph, fold(graph, tag=(lambda node: stages[node.path]) if stages else None), stages)


def stages_of(graph: LayerGraph, *, plan: Plan | None = None) -> dict[str, int] | None:
    """The stage of each node; None where there is one only."""
    if plan is not None:
        found = {path: stage.index for stage in plan.stages for path in stage.paths}
    else:
        found, stage = {}, 0
        for node in graph.nodes:
            found[node.path] = stage
            stage += node.cut_after and node.role in (Role.EMBED, Role.LAYER)
    return found if max(found.values()) else None


def _leads(owner: str) -> bool:
    """The first layer of a shared item; the others go with it."""
    return owner.count(".") == 1 or owner.endswith(".0")
