"""E124: groups of the gated norm are equally wide."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.mamba2.kind import d_inner
from mambadsl.text.diagnostic import declare

E124 = declare(
    "E124",
    "`norm_groups` does not divide the inner width",
    """
    The gated norm of a Mamba-2 layer works on `norm_groups` groups of channels, all equally wide, so it
    must divide heads * head_dim.

    Why: a norm over unequal groups is not what any published model computes.

    Example: `mamba2(heads=8, head_dim=32, norm_groups=3)`.

    Instead: `norm_groups=4`, or leave it out: it is `groups` then.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("mamba2"):
        width, groups = d_inner(site.f), site.f.norm_groups
        # A default follows `groups`, which E103 speaks about.
        if site.f.gated_norm != "none" and width % groups and site.f.heads % site.f.groups == 0:
            yield site.problem(
                E124, "`norm_groups` must divide the inner width", ("norm_groups", "heads", "head_dim"),
                label=f"{width} channels cannot be split into {groups} groups", help=(divide(width, groups),),
            )
