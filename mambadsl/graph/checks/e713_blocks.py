"""E713: where layers attend over the states at which blocks began, blocks begin."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.streams import begins
from mambadsl.text.diagnostic import Diagnostic, declare

E713 = declare(
    "E713",
    "no layer begins a block",
    """
    With `residual=attend` a layer chooses from the states at which blocks of layers began, and what its own block
    has added up so far. A block begins at a layer with `attend(begins=true)`. Where none does there is one state
    only, and the form is `pre` by another name: no layer has a query.

    Why: the model that was asked for attends over its depth, the one that was written adds up.

    Example: `layer A = attention(residual=attend)`, `layer F = mlp(residual=attend)`, `stack { [A F]*8 }`.

    Instead: `stack { [A(residual=attend(begins=true)) F A F]*4 }`, or `residual=pre`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    layers = subject.graph.layers
    if not layers or any(begins(node.layer.sub) is not False for node in layers):
        return
    origin = layers[0].layer.origins.get("residual")
    yield Problem(
        Diagnostic(
            E713, "every layer has `residual=attend`, and none begins a block",
            (origin.span if origin else None) or layers[0].layer.span or layers[0].span, "one state to read",
            help=("say `residual=attend(begins=true)` in the first layer of each block, or `residual=pre` in all",),
        ),
        (layers[0],),
    )
