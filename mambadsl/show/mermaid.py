"""The model as a Mermaid flowchart, as GitHub and many editors show it in Markdown.

In: a graph, and maybe a plan. Out: text that starts with `flowchart TD`.
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


def mermaid_text(graph: LayerGraph, *, plan: Plan | None = None) -> str:
    picture = flow(graph, plan=plan)
    lines = [
        "flowchart TD",
        *_items(picture, picture.items, "  ", iter(range(10**6))),
        *(f"  {_link(link)}" for link in picture.links),
        *(f"  {_style(i, box)}" for i, box in enumerate(picture.boxes)),
    ]
    return "\n".join(lines) + "\n"


def _items(picture: Flow, items: tuple[Item, ...], indent: str, numbers: Iterator[int]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Leaf):
            yield indent + _node(picture, item)
            continue
        yield f"{indent}subgraph g{next(numbers)}[{_quoted(item.title)}]"
        yield from _items(picture, item.items, indent + "  ", numbers)
        yield indent + "end"


def _node(picture: Flow, leaf: Leaf) -> str:
    text = "<br/>".join([f"<b>{_escaped(leaf.title)}</b>", *map(_escaped, picture.lines(leaf))])
    return f'n{picture.number[id(leaf)]}["{text}"]'


def _link(link: Link) -> str:
    if link.weights:
        return f"n{link.source} -.-|{link.sort}| n{link.target}"
    if link.carried:
        return f"n{link.source} -.->|{link.sort}| n{link.target}"
    return f"n{link.source} --> n{link.target}"


def _style(number: int, leaf: Leaf) -> str:
    fill, ink = of_kind(leaf.node)
    border = of_stage(leaf.tag) if leaf.tag is not None else "#5b6570"
    return f"style n{number} fill:{fill},stroke:{border},color:{ink}"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    """Quotes and brackets that HTML or Mermaid would read, as entities."""
    for char, entity in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(char, entity)
    return text
