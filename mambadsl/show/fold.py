"""A graph's nodes folded the way the source groups them: what repeats is there once, with a count.

In: nodes in order, with their `trail` of blocks, and (optionally) a tag for each, such as its pipeline stage.
Out: a tree of `Leaf`s and `Group`s; every node is in exactly one leaf, in order. Neighbours that are the same
(layers, blocks, tags, shared weights) fold; what an edited graph or a stage border tells apart stays apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from mambadsl.graph.graph import Frame, LayerGraph, Node, Role

Tag: TypeAlias = Callable[[Node], Any]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One row or box. count: neighbouring uses folded here, in one pass through the groups around it.
    nodes: all layers that it stands for, those of every pass. tag: the same for all of them."""

    label: str
    count: int
    nodes: tuple[Node, ...]
    tag: Any = None

    @property
    def node(self) -> Node:
        return self.nodes[0]

    @property
    def title(self) -> str:
        """`M x3`."""
        return times(self.label, self.count)

    @property
    def shared(self) -> str | None:
        """The owner of its weights, where other layers use them too."""
        return next((node.owner for node in self.nodes if _shared(node)), None)


@dataclass(frozen=True, slots=True)
class Group:
    """A block, `count` times in a row."""

    label: str
    count: int
    items: tuple[Item, ...]

    @property
    def title(self) -> str:
        """`[M F] x3`, `Local`."""
        return times(group_text(self.label), self.count)

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(node for leaf in leaves(self.items) for node in leaf.nodes)


Item: TypeAlias = "Leaf | Group"


def fold(graph: LayerGraph, *, tag: Tag | None = None) -> tuple[Item, ...]:
    """The whole model: embed, stack, head, `mtp` as a group of its depths."""
    tag = tag or (lambda node: None)
    return _plain(_fold([_Placed(node, frames_of(graph, node), tag(node)) for node in graph.nodes], 0))


def leaves(items: Iterable[Item]) -> Iterator[Leaf]:
    """All leaves, in order."""
    for item in items:
        if isinstance(item, Leaf):
            yield item
        else:
            yield from leaves(item.items)


def group_text(label: str) -> str:
    """How a group is called: `Local`, `[M F]`."""
    return f"[{label}]" if " " in label else label


def times(label: str, count: int) -> str:
    return f"{label} x{count}" if count > 1 else label


@dataclass(frozen=True, slots=True)
class _Placed:
    node: Node
    frames: tuple[Frame, ...]
    tag: Any


@dataclass(frozen=True, slots=True)
class _Folded:
    """An item and its signature: equal neighbours fold. parts: a leaf's nodes or a group's items."""

    item: Item
    signature: tuple
    parts: tuple[_Folded, ...] = field(default=(), repr=False)


def _fold(placed: Sequence[_Placed], depth: int) -> list[_Folded]:
    found = []
    for start, end, frame in passes([p.frames for p in placed], depth):
        found.append(
            _leaf(placed[start]) if frame is None else _group(frame.label, _fold(placed[start:end], depth + 1))
        )
    return _merged(found)


def passes(frames: Sequence[tuple[Frame, ...]], depth: int) -> Iterator[tuple[int, int, Frame | None]]:
    """(start, end, frame) of each pass through a block at this depth; (at, at + 1, None) for a node that stands
    in no block there. frames: of nodes in order, all in the same blocks above this depth."""
    at = 0
    while at < len(frames):
        frame = frames[at][depth] if len(frames[at]) > depth else None
        end = at + 1
        while frame is not None and end < len(frames) and _same_pass(frames[end], depth, frame):
            end += 1
        yield at, end, frame
        at = end


def _same_pass(frames: tuple[Frame, ...], depth: int, frame: Frame) -> bool:
    if len(frames) <= depth:
        return False
    other = frames[depth]
    return other is frame or (other == frame and _span(other) == _span(frame))


def _span(frame: Frame) -> tuple[int, int] | None:
    return (frame.span.start, frame.span.end) if frame.span else None


def _leaf(placed: _Placed) -> _Folded:
    node = placed.node
    label = node.layer.label if node.layer is not None else node.path.rpartition(".")[2]
    owner = node.owner if node.owner.startswith("shared.") else None
    return _Folded(Leaf(label, 1, (node,), placed.tag), (label, node.role, node.layer, owner, placed.tag))


def _group(label: str, items: list[_Folded]) -> _Folded:
    """The block; without a box of its own where it only holds one thing that is counted already."""
    if len(items) == 1:
        only = items[0]
        if isinstance(only.item, Leaf):
            leaf = replace(only.item, label=label if only.item.count == 1 else only.item.label)
            return _Folded(leaf, (leaf.label, *only.signature[1:]))
        if only.item.label == label:
            return only
    return _Folded(Group(label, 1, ()), (label, tuple((_count(i), i.signature) for i in items)), tuple(items))


def _count(folded: _Folded) -> int:
    return folded.item.count


def _merged(found: list[_Folded]) -> list[_Folded]:
    """Equal neighbours joined, in time linear in their number."""
    out: list[_Folded] = []
    at = 0
    while at < len(found):
        end = at + 1
        while end < len(found) and found[end].signature == found[at].signature:
            end += 1
        out.append(_joined(found[at:end]))
        at = end
    return out


def _joined(same: Sequence[_Folded]) -> _Folded:
    first = same[0]
    if len(same) == 1:
        return first
    count = sum(one.item.count for one in same)
    if isinstance(first.item, Leaf):
        return replace(first, item=replace(first.item, count=count, nodes=_nodes(same)))
    parts = tuple(_stacked(column) for column in zip(*(one.parts for one in same), strict=True))
    return _Folded(replace(first.item, count=count), first.signature, parts)


def _stacked(column: Sequence[_Folded]) -> _Folded:
    """The same place in several passes: nodes of all of them, the count of one."""
    first = column[0]
    if isinstance(first.item, Leaf):
        return replace(first, item=replace(first.item, nodes=_nodes(column)))
    return replace(first, parts=tuple(_stacked(c) for c in zip(*(one.parts for one in column), strict=True)))


def _nodes(same: Sequence[_Folded]) -> tuple[Node, ...]:
    return tuple(node for one in same for node in one.item.nodes)


def _plain(found: Iterable[_Folded]) -> tuple[Item, ...]:
    return tuple(
        one.item if isinstance(one.item, Leaf) else replace(one.item, items=_plain(one.parts)) for one in found
    )


def frames_of(graph: LayerGraph, node: Node) -> tuple[Frame, ...]:
    """Its trail; in the tail, inside a frame for the depth."""
    if not node.tail:
        return node.trail
    depths = graph.mtp.settings.depths if graph.mtp else 1
    return (Frame("mtp", node.depth, depths), *node.trail)


def _shared(node: Node) -> bool:
    return node.role is Role.LAYER and (node.shared or node.owner.startswith("shared."))
