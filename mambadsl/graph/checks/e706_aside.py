"""E706: what a layer gives aside of the residual stream is read."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.graph.graph import Node
from mambadsl.text.diagnostic import Diagnostic, declare
from mambadsl.text.source import Span

E706 = declare(
    "E706",
    "a layer aside of the stream that nothing reads",
    """
    A layer with `residual=aside` adds nothing to the residual stream; the next layer reads what it gives. So
    another layer must follow it, and the last one of a stack or of an `mtp` tail cannot be aside.

    Why: the layer would compute something that no output depends on.

    Example: `stack { M*6 A(residual=aside) }`.

    Instead: `stack { M*5 A(residual=aside) M }`, or `residual=pre`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    graph = subject.graph
    read = {edge.source for edge in graph.edges if edge.tensor == "t"}
    for node in graph.nodes:
        if node.aside and node.path not in read:
            message = f"layer `{node.path}` is aside of the stream, and no layer after it reads what it gives"
            help = ("a layer behind it, or `residual=pre`",)
            yield Problem(Diagnostic(E706, message, _place(node), "nothing reads this", help=help), (node,))


def _place(node: Node) -> Span | None:
    origin = node.layer.origins.get("residual")
    return (origin.span if origin else None) or node.layer.span or node.span
