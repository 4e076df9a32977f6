"""E108: the Mamba-1 kernel holds at most 256 states a channel."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E108 = declare(
    "E108",
    "`d_state` is too large for the Mamba-1 kernel",
    """
    For kernels: a Mamba-1 layer has `d_state` of at most 256.

    Why: the selective scan keeps the states of a channel in registers, and its kernel checks this limit.

    Example: `mamba1(d_state=512)` with the part set `fused`.

    Instead: `mamba1(d_state=256)`, or `mamba2`, which is made for large states.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("mamba1"):
        if site.f.d_state > 256:
            yield site.problem(
                E108, "`d_state` of a Mamba-1 layer is at most 256 in the kernel", ("d_state",),
                label=f"{site.f.d_state} states a channel", help=("`d_state=256`, or the kind `mamba2`",),
            )
