"""E215: the channels of a Mamba-1 layer are shared evenly by its heads, and the heads by devices."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E215 = declare(
    "E215",
    "the heads of a Mamba-1 layer do not divide",
    """
    Every head of `mamba1` has d_inner / heads channels with dt, B and C of their own, so `heads` must divide
    `d_inner`. Tensor parallelism splits a layer of several heads by them: `heads` must be a multiple of its
    size.

    Why: dt, B and C of a head come from all of its channels, on one device.

    Example: `mamba1(d_inner=7424, heads=3)`.

    Instead: `heads=2`, or any divisor of `d_inner`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    tp = subject.facts.tp
    for site in subject.sites("mamba1"):
        d_inner, heads = site.f.d_inner, site.f.heads
        if d_inner % heads:
            yield site.problem(
                E215, "`d_inner` must be a multiple of `heads`", ("heads", "d_inner"),
                label=f"{d_inner} channels cannot be shared by {heads} heads", help=(divide(d_inner, heads),),
            )
        if heads > 1 and heads % tp:
            yield site.problem(
                E215, "`heads` must be a multiple of the tensor-parallel size", ("heads",),
                label=f"{heads} cannot be split over {tp} devices", help=(f"tp: {divide(heads, tp)}",),
            )
