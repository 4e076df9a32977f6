"""E712: first tokens are kept only where a window loses them."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E712 = declare(
    "E712",
    "first tokens are kept where no window loses them",
    """
    With `keep=128` a layer of attention sees the first 128 tokens of each document through any window: attention
    sinks (arXiv:2309.17453), or the meta tokens of Hymba. Without a window a token sees all before it anyway.

    Why: the field would say something that nothing computes.

    Example: `attention(keep=128)`.

    Instead: `attention(window=1024, keep=128)`, or leave `keep` out.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.attending():
        if site.f.get("keep") and site.f.window is None:
            yield site.problem(
                E712, "`keep` needs a `window`", ("keep",), label=f"{site.f.keep} tokens are kept of all",
                help=("leave it out, or give a `window`",),
            )
