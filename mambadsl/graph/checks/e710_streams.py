"""E710: all layers read and write the same residual streams."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.graph.graph import Node, Role
from mambadsl.kinds.streams import NARROW, streams_of
from mambadsl.text.diagnostic import Diagnostic, Label, declare
from mambadsl.text.source import Span

E710 = declare(
    "E710",
    "layers do not agree on the residual streams",
    """
    With `residual=hyper`, `mhc` or `gated` a layer reads and writes several residual streams (`streams=4`); with
    every other form it reads and writes one. What one layer writes the next one reads, so all layers of the stack
    and of the `mtp` tail have the same number. `narrow` makes one stream of several before the head; where there
    is only one, there is nothing to narrow.

    Why: a layer that adds to one stream has no place in a model of four, and no single meaning there.

    Example: `layer A = attention(residual=mhc(streams=4))`, `layer F = mlp()`, `stack { A F }`.

    Instead: `layer F = mlp(residual=mhc(streams=4))`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    graph = subject.graph
    layers = [node for node in graph.nodes if node.role is Role.LAYER]
    first, n = layers[0], graph.streams
    seen: set[int] = set()
    for node in layers:
        own = streams_of(node.layer.sub)
        if own == n or id(node.layer) in seen:
            continue
        seen.add(id(node.layer))
        message = f"layer `{node.path}` has {_count(own)} and `{first.path}` {_count(n)}"
        labels = (Label(place, f"{_count(n)} here"),) if (place := _place(first)) else ()
        fits = f"`residual={_text(first)}` fits in this model" if n > 1 else "every layer needs the same `streams`"
        yield Problem(Diagnostic(E710, message, _place(node), f"{_count(own)} here", labels, help=(fits,)), (node,))
    if n == 1 and graph.model.narrow != NARROW.convert_word("mean"):
        message = f"`narrow = {NARROW.text(graph.model.narrow)}`, and every layer has one residual stream"
        help = ("leave it out, or give layers `residual=hyper`, `mhc` or `gated`",)
        yield Problem(Diagnostic(E710, message, help=help), ())


def _count(streams: int) -> str:
    return "one residual stream" if streams == 1 else f"{streams} residual streams"


def _text(node: Node) -> str:
    residual = node.layer.sub.residual
    return f"{residual.name}(streams={residual.streams})"


def _place(node: Node) -> Span | None:
    origin = node.layer.origins.get("residual")
    return (origin.span if origin else None) or node.layer.span or node.span
