"""I702: attention without positions comes after a layer that carries the order."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.registry import get
from mambadsl.text.diagnostic import Diagnostic, declare

I702 = declare(
    "I702",
    "attention without positions before the first recurrent layer",
    """
    An attention layer without position embedding stands before all recurrent layers.

    Why: it sees its tokens without order, which only layers after it learn of. Published hybrids start with a
    Mamba layer.

    Example: `stack { A M M M }` with `layer A = attention(rope=none)`.

    Instead: `stack { M A M M }`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    layers = subject.graph.layers
    kinds = [{mixer.kind for mixer in node.layer.branches} for node in layers]
    first = next((i for i, found in enumerate(kinds) if any(get(kind).recurrent for kind in found)), None)
    if first is None:
        return
    blind = [
        node for node in layers[:first]
        if any(get(m.kind).attends and m.fields.rope.name == "none" for m in node.layer.branches)
    ]
    if blind:
        message = "this attention layer sees tokens without their order"
        label, help = "no position embedding, and no recurrent layer before it", ("start with a Mamba layer",)
        yield Problem(Diagnostic(I702, message, blind[0].span, label, help=help), tuple(blind))
