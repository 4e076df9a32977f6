"""I705: in models with feed-forward layers, attention is followed by one, and one is last."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.registry import get
from mambadsl.text.diagnostic import Diagnostic, declare

I705 = declare(
    "I705",
    "a mixer without a feed-forward layer after it",
    """
    The model has feed-forward layers, but an attention layer is not followed by one, or the last layer of the
    stack is a mixer.

    Why: no released hybrid is laid out so; often a layer was forgotten.

    Example: `stack { [M F]*3 A [M F]*3 M }`.

    Instead: `stack { [M F]*3 A F [M F]*3 }`.
    """,
)
FEED_FORWARD = ("mlp", "moe")


def check(subject: Subject) -> Iterator[Problem]:
    # What stands aside of the stream is a part of the layer that reads it.
    layers = [node for node in subject.graph.layers if not node.aside]
    feeds = [all(mixer.kind in FEED_FORWARD for mixer in node.layer.branches) for node in layers]
    if not any(feeds):
        return
    attention = [any(get(mixer.kind).attends for mixer in node.layer.branches) for node in layers]
    for node, is_attention, feeds_next in zip(layers, attention, feeds[1:]):
        if is_attention and not feeds_next:
            message = "this attention layer is not followed by a feed-forward layer"
            yield Problem(Diagnostic(I705, message, node.span, "no `mlp` or `moe` after it"), (node,))
    if not feeds[-1]:
        message = "the last layer is not a feed-forward layer"
        yield Problem(Diagnostic(I705, message, layers[-1].span, "the last layer"))
