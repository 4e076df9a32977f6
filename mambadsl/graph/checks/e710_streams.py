"""E710: all layers read and write the same residual streams."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.graph.graph import Node, Role
from mambadsl.kinds.streams import NARROW, begins, streams_of
from mambadsl.text.diagnostic import Diagnostic, Label, declare
from mambadsl.text.source import Span

E710 = declare(
    "E710",
    "layers do not agree on the residual streams",
    """
    With `residual=hyper`, `mhc` or `gated` a layer reads and writes several residual streams (`streams=4`);
    with `attend` it reads one for each block of layers above it, and its own block's; with every other form it
    reads and writes one. What one layer writes the next one reads, so all layers of the stack and of the `mtp`
    tail have the same number, or all have `attend`. `narrow` makes one stream of several before the head; where
    there is only one, there is nothing to narrow.

    Why: a layer that adds to one stream has no place in a model of four, and no single meaning there.

    Example: `layer A = attention(residual=mhc(streams=4))`, `layer F = mlp()`, `stack { A F }`.

    Instead: `layer F = mlp(residual=mhc(streams=4))`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    graph = subject.graph
    layers = [node for node in graph.nodes if node.role is Role.LAYER]
    first, kept = layers[0], _kept(layers[0])
    seen: set[int] = set()
    for node in layers:
        own = _kept(node)
        if own == kept or id(node.layer) in seen:
            continue
        seen.add(id(node.layer))
        message = f"layer `{node.path}` has {_says(own)} and `{first.path}` {_says(kept)}"
        labels = (Label(place, f"{_says(kept)} here"),) if (place := _place(first)) else ()
        fits = f"`residual={_text(first)}` fits in this model" if kept != ONE else _ONE_FITS[own[1]]
        yield Problem(Diagnostic(E710, message, _place(node), f"{_says(own)} here", labels, help=(fits,)), (node,))
    if kept == ONE and graph.model.narrow != NARROW.convert_word("mean"):
        message = f"`narrow = {NARROW.text(graph.model.narrow)}`, and every layer has one residual stream"
        help = ("leave it out, or give layers `residual=hyper`, `mhc`, `gated` or `attend`",)
        yield Problem(Diagnostic(E710, message, help=help), ())


#: (streams that a chain begins with, whether there are more the deeper it is) of the forms with one stream.
ONE = 1, False
_ONE_FITS = {False: "every layer needs the same `streams`", True: "every layer needs `residual=attend`, or none"}


def _kept(node: Node) -> tuple[int, bool]:
    sub = node.layer.sub
    return streams_of(sub), begins(sub) is not None


def _says(kept: tuple[int, bool]) -> str:
    streams, grows = kept
    if grows:
        return "a residual stream for each block"
    return "one residual stream" if streams == 1 else f"{streams} residual streams"


def _text(node: Node) -> str:
    residual, (streams, grows) = node.layer.sub.residual, _kept(node)
    return residual.name if grows else f"{residual.name}(streams={streams})"


def _place(node: Node) -> Span | None:
    origin = node.layer.origins.get("residual")
    return (origin.span if origin else None) or node.layer.span or node.span
