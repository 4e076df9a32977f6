"""E202: tensor parallelism gives every device whole groups."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E202 = declare(
    "E202",
    "the groups of a Mamba-2 layer do not divide among devices",
    """
    Tensor parallelism over `tp` devices splits Mamba-2 layers by groups, so tp must divide `groups`. vLLM
    also copies a single group to all devices.

    Why: heads of one group share B and C, and the gated norm works on whole groups: on two devices they
    would need communication inside the scan.

    Example: `mamba2(heads=256, groups=8)` with tp=32.

    Instead: `groups=32`, or tp=8.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    for site in subject.sites("mamba2"):
        groups = site.f.groups
        if groups % facts.tp and not (groups == 1 and facts.tool.copies_one_group):
            yield site.problem(
                E202, "`groups` must be a multiple of the tensor-parallel size", ("groups",),
                label=f"{groups} cannot be split over {facts.tp} devices",
                help=(f"tp: {divide(groups, facts.tp)}",),
            )
