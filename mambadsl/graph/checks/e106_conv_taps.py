"""E106: causal-conv1d has kernels for 2, 3 and 4 taps."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E106 = declare(
    "E106",
    "no kernel for so many convolution taps",
    """
    For kernels: `d_conv` must be 2, 3 or 4.

    Why: causal_conv1d is compiled for these widths only.

    Example: `mamba2(d_conv=7)` with the part set `fused`.

    Instead: `d_conv=4`, or the part set `reference`, which takes any width.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("mamba1", "mamba2"):
        if site.f.d_conv not in (2, 3, 4):
            yield site.problem(
                E106, "`d_conv` must be 2, 3 or 4 for causal_conv1d", ("d_conv",),
                label=f"{site.f.d_conv} taps",
                help=(f"`d_conv={2 if site.f.d_conv < 2 else 4}` is the nearest",),
            )
