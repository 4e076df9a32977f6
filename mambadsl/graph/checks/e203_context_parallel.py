"""E203: context parallelism splits Mamba-2 layers by heads and groups."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divisors, listed
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E203 = declare(
    "E203",
    "a Mamba-2 layer cannot be split for context parallelism",
    """
    Between all-to-all exchanges, each of `cp` devices runs the whole sequence for a share of the heads: cp
    must divide the heads of a tensor-parallel part, and its groups. Megatron also copies groups, if cp is a
    multiple of them.

    Why: the recurrence needs every token in order, so it is heads that are split, not tokens.

    Example: `mamba2(heads=12, groups=3)` with cp=2.

    Instead: `groups=4`, or cp=3.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    for site in subject.sites("mamba2"):
        heads, groups = site.f.heads // facts.tp, max(1, site.f.groups // facts.tp)
        if heads == 0:
            continue

        def splits(cp: int) -> bool:
            copied = facts.tool.copies_groups and cp % groups == 0
            return heads % cp == 0 and (groups % cp == 0 or copied)

        if not splits(facts.cp):
            legal = [cp for cp in divisors(heads) if splits(cp)][-8:]
            field = "heads" if heads % facts.cp else "groups"
            yield site.problem(
                E203, f"`{field}` must be a multiple of the context-parallel size", (field,),
                label=f"{heads} heads in {groups} groups on a device cannot be split over {facts.cp}",
                help=(f"cp may be {listed(legal, word='or')} with tp={facts.tp}",),
            )
