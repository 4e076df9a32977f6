"""The model as an SVG picture: a flow from top to bottom, groups as nested boxes with their counts, colours
by kind, pipeline stages as bars on the left, carried tensors and common weights as lines on the right.

In: a graph, and maybe a plan. Out: SVG text, the same for the same model. Needs no other program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mambadsl.graph.cost import Cost, costs, total
from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.show.colors import named, of_kind, of_stage
from mambadsl.show.describe import kind_text, mixer_text, shape_text
from mambadsl.show.flow import Flow, Link, flow
from mambadsl.show.fold import Group, Item, Leaf, group_text
from mambadsl.show.marks import fitted, page, path, rect, text, wide
from mambadsl.show.units import count, layers, percent

if TYPE_CHECKING:
    from mambadsl.plan.plan import Plan

BOX, HEIGHT, SUM_HEIGHT = 330, 42, 92
GAP, PAD, HEADER = 18, 14, 24
TOP, MARGIN, BAR, LANE = 92, 24, 26, 20
EDGE, SOFT, MUTED = "#5b6570", "#c5ccd3", "#52606d"
CARRIED, COMMON = "#2f6db5", "#a8650b"


@dataclass(frozen=True, slots=True)
class _Placed:
    item: Item
    x: float
    y: float
    w: float
    h: float


@dataclass(eq=False)
class _Layout:
    """Boxes and frames with their places; frames come before what they hold."""

    center: float
    boxes: list[_Placed] = field(default_factory=list)
    frames: list[_Placed] = field(default_factory=list)

    def place(self, items: tuple[Item, ...], y: float) -> float:
        """Puts items below y; the bottom of the last."""
        for i, item in enumerate(items):
            y += GAP if i else 0
            if isinstance(item, Leaf):
                h = SUM_HEIGHT if _branches(item) > 1 else HEIGHT
                self.boxes.append(_Placed(item, self.center - BOX / 2, y, BOX, h))
                y += h
                continue
            w = BOX + 2 * PAD * _nesting((item,))
            at = len(self.frames)
            bottom = y
            self.frames.append(_Placed(item, 0, 0, 0, 0))
            bottom = self.place(item.items, y + HEADER + PAD / 2) + PAD
            self.frames[at] = _Placed(item, self.center - w / 2, y, w, bottom - y)
            y = bottom
        return y


def svg_text(graph: LayerGraph, *, plan: Plan | None = None) -> str:
    picture = flow(graph, plan=plan)
    table = costs(graph)
    whole = total(table)
    lanes = _lanes(picture)
    left = MARGIN + (BAR + 12 if picture.stages else 0)
    column = BOX + 2 * PAD * max(1, _nesting(picture.items))
    layout = _Layout(left + column / 2)
    bottom = layout.place(picture.items, TOP)
    right = left + column
    width = right + (14 + LANE * len(lanes) if lanes else 0) + MARGIN
    legend, height = _legend(picture, bottom + 26, width)
    body = [
        *_title(graph, whole, picture, width),
        *(_stage_bars(picture, layout) if picture.stages else []),
        *(mark for frame in layout.frames for mark in _frame(frame)),
        *_spine(picture, layout),
        *(mark for box in layout.boxes for mark in _box(graph, box, table, whole)),
        *_side_lines(lanes, layout, right + 14),
        *legend,
    ]
    return page(width, height, f"{graph.name}: {layers(len(graph.layers))}", body)


def _title(graph: LayerGraph, whole: Cost, picture: Flow, width: float) -> list[str]:
    model = graph.model
    size_ = [layers(len(graph.layers)), f"{count(whole.params)} params"]
    size_ += [f"{count(whole.active_params)} active"] * (whole.active_params != whole.params)
    size_ += [f"{picture.stage_count} stages"] * bool(picture.stages)
    shape = [f"d_model {model.d_model}", f"vocab {model.vocab}", f"context {model.context}"]
    return [
        text(MARGIN, 34, fitted(graph.name, width - 2 * MARGIN, size=20), size=20, bold=True),
        text(MARGIN, 54, fitted(" · ".join(size_), width - 2 * MARGIN, size=11), size=11.5, fill=MUTED),
        text(MARGIN, 70, fitted(" · ".join(shape), width - 2 * MARGIN, size=11), size=11.5, fill=MUTED),
    ]


def _box(graph: LayerGraph, at: _Placed, table: dict[str, Cost], whole: Cost) -> Iterator[str]:
    leaf: Leaf = at.item
    node = leaf.node
    fill, ink = of_kind(node)
    cost = total({n.path: table[n.path] for n in leaf.nodes})
    border = of_stage(leaf.tag) if leaf.tag is not None else EDGE
    for behind in range(min(leaf.count - 1, 2), 0, -1):
        yield rect(at.x + 4 * behind, at.y + 4 * behind, at.w, at.h, fill=fill, stroke=SOFT)
    paths = [n.path for n in leaf.nodes]
    hover = f"{paths[0]}" + (f" ... {paths[-1]} ({len(paths)} layers)" if len(paths) > 1 else "")
    yield rect(at.x, at.y, at.w, at.h, fill=fill, stroke=border, width=1.2, title=hover)
    several = _branches(leaf) > 1
    numbers = f"{count(cost.params)}, {percent(cost.params, whole.params)}"
    if leaf.shared and cost.params == 0:
        numbers = "(shared)"
    room = at.w - 30 - wide(numbers, size=11)
    name = fitted(leaf.label, room, size=13)
    kind = fitted("sum" if several else kind_text(node), room - wide(name, size=14), size=11.5)
    yield text(at.x + 10, at.y + 17, name, size=13, fill=ink, bold=True, after=kind)
    yield text(at.x + at.w - 10, at.y + 17, numbers, size=11, fill=ink, anchor="end")
    if not several:
        shape = fitted(shape_text(graph, node), at.w - 20, size=9.6)
        yield text(at.x + 10, at.y + 33, shape, size=10, fill=MUTED)
    else:
        yield from _sum(at)
    if leaf.count > 1:
        yield from _pill(at.x + at.w - 18 - wide(f"x{leaf.count}", size=10), at.y - 11, f"x{leaf.count}")


def _sum(at: _Placed) -> Iterator[str]:
    """The branches of a sum, side by side with a plus between them."""
    mixers = at.item.node.layer.branches
    between = 18
    w = (at.w - 20 - between * (len(mixers) - 1)) / len(mixers)
    for i, mixer in enumerate(mixers):
        x, y = at.x + 10 + i * (w + between), at.y + 27
        yield rect(x, y, w, at.h - 37, fill=named(mixer.kind), stroke=EDGE, width=0.8, radius=5)
        label = mixer.name or mixer.kind
        yield text(x + 8, y + 16, fitted(label, w / 2, size=12), size=12, bold=True)
        if mixer.name:
            yield text(x + w - 8, y + 16, fitted(mixer.kind, w / 2, size=10), size=10, fill=MUTED, anchor="end")
        words = mixer_text(mixer).split()
        half = -(-len(words) // 2)
        for line, part in enumerate((words[:half], words[half:])):
            yield text(x + 8, y + 31 + 13 * line, fitted(" ".join(part), w - 14, size=9), size=9.2, fill=MUTED)
        if i:
            yield text(x - between / 2, y + (at.h - 37) / 2 + 5, "+", size=16, anchor="middle", bold=True)


def _frame(at: _Placed) -> Iterator[str]:
    group: Group = at.item
    yield rect(at.x, at.y, at.w, at.h, fill="#1f2933", opacity=0.03, stroke="#9aa5b1", radius=9)
    label = group_text(group.label)
    name = fitted(label, at.w - 80, size=12)
    yield text(at.x + PAD, at.y + 17, name, size=12, fill=MUTED, bold=True)
    if group.count > 1:
        shown = f"x{group.count}"
        yield from _pill(at.x + at.w - PAD - 14 - wide(shown, size=10), at.y + 6, shown)


def _pill(x: float, y: float, words: str) -> Iterator[str]:
    w = 12 + wide(words, size=10)
    yield rect(x, y, w, 15, fill="#1f2933", radius=7.5)
    yield text(x + w / 2, y + 11, words, size=10, fill="#ffffff", anchor="middle", bold=True)


def _spine(picture: Flow, layout: _Layout) -> Iterator[str]:
    """What each box hands to the next."""
    for link in picture.links:
        if _to_next(link):
            above, below = layout.boxes[link.source], layout.boxes[link.target]
            start = above.y + above.h + 4 * min(above.item.count - 1, 2)
            yield path([(layout.center, start), (layout.center, below.y - 1)], stroke=EDGE, arrow=True)
            if link.sort != "x":
                yield text(layout.center + 6, below.y - 7, link.sort, size=10, fill=CARRIED)


def _to_next(link: Link) -> bool:
    return link.target == link.source + 1 and not link.weights


def _stage_bars(picture: Flow, layout: _Layout) -> Iterator[str]:
    extent: dict[int, list[float]] = {}
    for box in layout.boxes:
        top, bottom = extent.setdefault(box.item.tag, [box.y, 0.0])
        extent[box.item.tag] = [min(top, box.y), max(bottom, box.y + box.h)]
    for stage, (top, bottom) in extent.items():
        yield rect(MARGIN, top, BAR, bottom - top, fill=of_stage(stage), radius=5)
        words = f"stage {stage}" if bottom - top > 60 else str(stage)
        yield text(
            MARGIN + BAR / 2 + 4,
            (top + bottom) / 2,
            words,
            size=12,
            fill="#ffffff",
            anchor="middle",
            bold=True,
            turn=True,
        )


@dataclass(frozen=True, slots=True)
class _Lane:
    """Lines that run together: from one box to several (carried), or through several (common weights)."""

    label: str
    boxes: tuple[int, ...]
    carried: bool


def _lanes(picture: Flow) -> list[_Lane]:
    found: dict[tuple, list[int]] = {}
    for link in picture.links:
        box = picture.boxes[link.source]
        if _to_next(link):
            continue
        if not link.weights:
            found.setdefault((link.sort, str(link.source), True), [link.source]).append(link.target)
        else:
            owner = box.node.owner.split(".")[1] if link.sort == "shared" else ""
            ends = found.setdefault((f"{link.sort} {owner}".strip(), owner, False), [link.source])
            ends.append(link.target)
    lanes = [_Lane(label, tuple(dict.fromkeys(ends)), carried) for (label, _, carried), ends in found.items()]
    return sorted(lanes, key=lambda lane: (max(lane.boxes) - min(lane.boxes), lane.label))


def _side_lines(lanes: list[_Lane], layout: _Layout, start: float) -> Iterator[str]:
    for i, lane in enumerate(lanes):
        x = start + LANE * i
        color, dash = (CARRIED, "5 3") if lane.carried else (COMMON, "2 3")
        shift = -6 + 12 * (i + 1) / (len(lanes) + 1)
        ends = [(_right(layout.boxes[k]), _middle(layout.boxes[k]) + shift) for k in lane.boxes]
        first = ends[0]
        for k, end in enumerate(ends[1:]):
            begin = first if lane.carried or k == 0 else ends[k]
            yield path([begin, (x, begin[1]), (x, end[1]), end], stroke=color, dash=dash, arrow=lane.carried)
        low, high = ends[0][1], ends[1][1]
        middle = low + min((high - low) / 2, 70)
        back = wide(lane.label, size=10) + 6
        yield rect(x - 7, middle - back / 2, 14, back, fill="#ffffff", radius=3)
        yield text(x + 3.5, middle, lane.label, size=10, fill=color, anchor="middle", turn=True)


def _right(at: _Placed) -> float:
    return at.x + at.w + 4 * min(at.item.count - 1, 2)


def _middle(at: _Placed) -> float:
    return at.y + at.h / 2


def _legend(picture: Flow, y: float, width: float) -> tuple[list[str], float]:
    kinds = dict.fromkeys(
        branch.kind for box in picture.boxes if box.node.role is Role.LAYER for branch in box.node.layer.branches
    )
    marks, x = [], float(MARGIN)
    for kind in kinds:
        step = 18 + wide(kind, size=11) + 18
        if x + step > width - MARGIN + 18 and x > MARGIN:
            x, y = MARGIN, y + 20
        marks += [
            rect(x, y - 10, 13, 13, fill=named(kind), stroke=EDGE, width=0.8, radius=3),
            text(x + 18, y + 1, kind, size=11, fill=MUTED),
        ]
        x += step
    return marks, y + 24


def _branches(leaf: Leaf) -> int:
    return len(leaf.node.layer.branches) if leaf.node.layer is not None else 0


def _nesting(items: tuple[Item, ...]) -> int:
    return max((1 + _nesting(i.items) for i in items if isinstance(i, Group)), default=0)
