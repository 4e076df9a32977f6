"""E217: rope rotates pairs of channels."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mambadsl.graph.checks.legal import near, settings
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E217 = declare(
    "E217",
    "rope has no whole pairs of channels to rotate",
    """
    Rotary embeddings rotate channels in pairs: head_dim * fraction must be an even whole number, at least 2;
    and so must be `rope_dim` of `mla` and, of Mamba-3, d_state * rope_fraction.

    Why: an odd channel would be left out without a word.

    Example: `attention(heads=4, head_dim=15, rope=rope())`.

    Instead: `head_dim=16`; or a `fraction` that makes it even, such as `rope(fraction=0.5)` of 64.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("attention", "cca"):
        rope = site.f.rope
        unfit = site.defaulted("head_dim") and subject.graph.model.d_model % site.f.heads
        if rope.name == "none" or unfit:  # E216 speaks about the latter
            continue
        # As written: 0.4 is 2/5 here, not the float nearest to it.
        share = Fraction(str(rope.fraction))
        width = site.f.head_dim * share
        whole = 2 if rope.name == "proportional" else 1
        if width % 2 or width == 0 or site.f.head_dim % whole:
            legal = near(site.f.head_dim, lambda p: p * share % 2 == 0 and p % whole == 0)
            yield site.problem(
                E217, "the rotated part of a head must be an even number of channels", ("head_dim", "rope"),
                label=f"{site.f.head_dim} * {rope.fraction} = {float(width):g} channels are rotated",
                help=(settings("head_dim", legal),) if legal else (),
            )
    for site in subject.sites("mla"):
        rope_dim = site.f.rope_dim
        if site.f.rope.name == "rope" and rope_dim % 2:
            yield site.problem(
                E217, "the rotated part of a head must be an even number of channels", ("rope_dim", "rope"),
                label=f"{rope_dim} channels are rotated",
                help=(settings("rope_dim", near(rope_dim, lambda n: n % 2 == 0)),),
            )
    for site in subject.sites("mamba3"):
        share = Fraction(str(site.f.rope_fraction))
        width = site.f.d_state * share
        if width % 2 or width == 0:
            legal = near(site.f.d_state, lambda n: n * share % 2 == 0)
            yield site.problem(
                E217, "the part of a state that turns must be an even number", ("d_state", "rope_fraction"),
                label=f"{site.f.d_state} * {site.f.rope_fraction} = {float(width):g} of each state turn",
                help=(settings("d_state", legal),) if legal else (),
            )
