"""The model in Graphviz DOT: boxes in running order, clusters for groups, dashed lines for what is carried
past the residual stream, dotted ones between uses of the same weights.

In: a graph, and maybe a plan. Out: text for `dot -Tsvg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mambadsl.graph.graph import LayerGraph
from mambadsl.show.colors import of_kind, of_stage
from mambadsl.show.flow import Flow, Link, flow
from mambadsl.show.fold import Item, Leaf

if TYPE_CHECKING:
    from mambadsl.plan.plan import Plan


def dot_text(graph: LayerGraph, *, plan: Plan | None = None) -> str:
    picture = flow(graph, plan=plan)
    lines = [
        f"digraph {_quoted(graph.name)} {{",
        '  graph [rankdir=TB, fontname="Helvetica", fontsize=11, compound=true, newrank=true];',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=11, penwidth=1];',
        '  edge [fontname="Helvetica", fontsize=9, arrowsize=0.6];',
        *_items(picture, picture.items, "  ", iter(range(10**6))),
        *(f"  {_link(link)}" for link in picture.links),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _items(picture: Flow, items: tuple[Item, ...], indent: str, numbers: Iterator[int]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Leaf):
            yield indent + _node(picture, item)
            continue
        yield f"{indent}subgraph cluster_{next(numbers)} {{"
        yield f"{indent}  label={_quoted(item.title)};"
        yield f'{indent}  labeljust=l; style=rounded; color="#9aa3ad";'
        yield from _items(picture, item.items, indent + "  ", numbers)
        yield indent + "}"


def _node(picture: Flow, leaf: Leaf) -> str:
    fill, _ = of_kind(leaf.node)
    border = of_stage(leaf.tag) if leaf.tag is not None else "#5b6570"
    label = _quoted("\n".join([leaf.title, *picture.lines(leaf)]))
    return f'n{picture.number[id(leaf)]} [label={label}, fillcolor="{fill}", color="{border}"];'


def _link(link: Link) -> str:
    ends = f"n{link.source} -> n{link.target}"
    if link.weights:
        return f'{ends} [style=dotted, dir=none, constraint=false, color="#8a5a00", label="{link.sort}"];'
    if link.carried:
        return f'{ends} [style=dashed, constraint=false, color="#3465a4", label="{link.sort}"];'
    return f"{ends};"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
