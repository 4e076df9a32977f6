"""The model as a tree of text: groups with their counts, a line for each layer.

In: a graph, and maybe a plan. Out: text; a line says the stage where a new one begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mambadsl.graph.graph import LayerGraph, Role
from mambadsl.show.describe import kind_text, mixer_text, shape_text
from mambadsl.show.flow import flow
from mambadsl.show.fold import Group, Item, Leaf

if TYPE_CHECKING:
    from mambadsl.plan.plan import Plan

WIDTH = 110


def tree_text(graph: LayerGraph, *, plan: Plan | None = None) -> str:
    """`x3` folds neighbours that are the same; `(shared S)` marks layers with one set of weights."""
    picture = flow(graph, plan=plan)
    lines = list(_lines(graph, picture.items, ""))
    names = max(len(name) for name, _, _ in lines)
    out, stage = [graph.name], None
    for name, words, tag in lines:
        new = tag is not None and tag != stage
        stage = tag if new else stage
        mark = f"  | stage {tag}" if new else ""
        room = WIDTH - len(mark)
        text = f"{name.ljust(names)}  {words}".rstrip()
        out.append((text if len(text) <= room else text[: room - 3].rstrip() + "...") + mark)
    return "\n".join(out) + "\n"


def _lines(graph: LayerGraph, items: tuple[Item, ...], indent: str) -> Iterator[tuple[str, str, int | None]]:
    """(branch and name, words behind it, stage)"""
    for i, item in enumerate(items):
        last = i == len(items) - 1
        arm, below = ("`- ", "   ") if last else ("|- ", "|  ")
        if isinstance(item, Group):
            yield indent + arm + item.title, "", None
            yield from _lines(graph, item.items, indent + below)
            continue
        yield indent + arm + item.title, _words(graph, item), item.tag
        branches = item.node.layer.branches if item.node.layer is not None else ()
        for j, mixer in enumerate(branches if len(branches) > 1 else ()):
            end = "`+ " if j == len(branches) - 1 else "|+ "
            yield indent + below + end + (mixer.name or mixer.kind), f"{mixer.kind}  {mixer_text(mixer)}", None


def _words(graph: LayerGraph, leaf: Leaf) -> str:
    node = leaf.node
    several = node.layer is not None and len(node.layer.branches) > 1
    words = ["sum of" if several else kind_text(node), shape_text(graph, node)]
    if node.role is Role.LAYER and node.layer.sub.input != "stream":
        words.append(f"input={node.layer.sub.input}")
    if node.aside:
        words.append("residual=aside")
    if leaf.shared:
        words.append(f"(shared {leaf.shared.removeprefix('shared.')})")
    return "  ".join(filter(None, words))
