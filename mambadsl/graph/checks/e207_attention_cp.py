"""E207: context parallelism splits the tokens of attention into 2 * cp pieces."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import listed, multiples_near
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E207 = declare(
    "E207",
    "the length does not divide for context parallelism",
    """
    With attention layers, context parallelism over `cp` devices needs a length that is a multiple of 2 * cp.

    Why: every device gets one piece from the front and one from the back, so that all have the same work
    under the causal mask.

    Example: length 1,000 with cp=16.

    Instead: length 992 or 1,024; packed documents need it each.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    pieces, length = 2 * subject.facts.cp, subject.length
    if pieces == 2 or length % pieces == 0:
        return
    for site in subject.attending():
        yield site.problem(
            E207, f"the length must be a multiple of 2 * cp = {pieces}",
            label=f"{length:,} tokens cannot be cut into {pieces} equal pieces",
            labels=subject.setting_label("context") if subject.facts.length is None else (),
            help=(f"length {listed((f'{n:,}' for n in multiples_near(length, pieces)), word='or')}",),
        )
        return
