"""W701: something in the model knows the order of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

W701 = declare(
    "W701",
    "nothing tells the model about positions",
    """
    All attention layers are without position embedding, and there is no recurrent layer.

    Why: hybrids drop rope because Mamba layers carry the order. Without both, order is known only from what
    the causal mask leaves visible, which trains worse and rarely is what was meant.

    Example: `layer A = attention(rope=none)` and `stack { [A F]*12 }`.

    Instead: `rope=rope(theta=10_000)`, or Mamba layers in between.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    sites = list(subject.attending())
    if not sites or any(site.f.rope.name != "none" for site in sites) or any(subject.recurrent()):
        return
    message = "no layer knows the order of tokens"
    label = "no position embedding, and no recurrent layer in the model"
    place = sites[0].given("rope") or sites[0].span
    nodes = tuple(node for site in sites for node in site.nodes)
    yield Problem(Diagnostic(W701, message, place, label, help=("`rope=rope(theta=10_000)`",)), nodes)
