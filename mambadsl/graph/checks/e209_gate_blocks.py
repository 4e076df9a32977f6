"""E209: the gates of a linear recurrent unit are square blocks of equal width, equally many on every device."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E209 = declare(
    "E209",
    "the gate blocks of a recurrent unit do not divide",
    """
    The gates of `rg_lru` are products with `blocks` square blocks of d_inner / blocks channels, so `blocks` must
    divide `d_inner`; and be a multiple of the tensor-parallel size, where there is one.

    Why: a block is one dense product, on one device.

    Example: `rg_lru(d_inner=2560, blocks=12)`.

    Instead: `blocks=10`, or any divisor of `d_inner`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    tp = subject.facts.tp
    for site in subject.sites("rg_lru"):
        d_inner, blocks = site.f.d_inner, site.f.blocks
        if d_inner % blocks:
            yield site.problem(
                E209, "`d_inner` must be a multiple of `blocks`", ("blocks", "d_inner"),
                label=f"{d_inner} channels cannot be cut into {blocks} blocks", help=(divide(d_inner, blocks),),
            )
        if blocks % tp:
            yield site.problem(
                E209, "`blocks` must be a multiple of the tensor-parallel size", ("blocks",),
                label=f"{blocks} cannot be split over {tp} devices", help=(f"tp: {divide(blocks, tp)}",),
            )
