"""W110: vLLM runs all Mamba-2 layers with one chunk."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Label, declare

W110 = declare(
    "W110",
    "Mamba-2 layers with different chunks",
    """
    For targets with one chunk for the whole model (vLLM): all Mamba-2 layers should have the same `chunk`.

    Why: vLLM computes the chunk boundaries of a batch once, from one number, for all layers.

    Example: `mamba2(chunk=128)` and `mamba2(chunk=256)` in one model.

    Instead: the same `chunk` everywhere. The result does not depend on it.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    if not subject.facts.tool.one_chunk:
        return
    first = None
    for site in subject.sites("mamba2"):
        first = first or site
        if site.f.chunk != first.f.chunk:
            place = first.given("chunk") or first.span
            labels = (Label(place, f"{first.f.chunk} here"),) if place else ()
            yield site.problem(
                W110, f"`chunk` should be the same in all Mamba-2 layers for `{subject.facts.target}`",
                ("chunk",), label=f"{site.f.chunk} here", labels=labels, help=(f"`chunk={first.f.chunk}`",),
            )
