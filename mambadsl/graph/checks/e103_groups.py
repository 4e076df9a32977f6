"""E103: heads of a Mamba-2 layer are split evenly into groups."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E103 = declare(
    "E103",
    "`heads` is not a multiple of `groups`",
    """
    The heads of one group share B and C, and all groups have equally many heads.

    Why: the scan reads group `head // (heads / groups)`; no kernel takes groups of unequal size.

    Example: `mamba2(heads=24, groups=5)`.

    Instead: `groups=4`, or any divisor of `heads`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("mamba2", "mamba3"):
        heads, groups = site.f.heads, site.f.groups
        if heads % groups:
            yield site.problem(
                E103, "`heads` must be a multiple of `groups`", ("groups", "heads"),
                label=f"{heads} heads cannot be split into {groups} groups", help=(divide(heads, groups),),
            )
