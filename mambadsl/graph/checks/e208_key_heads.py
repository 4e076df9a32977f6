"""E208: heads of values are shared evenly by key heads, and both split evenly over devices."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E208 = declare(
    "E208",
    "the heads of a delta net do not divide",
    """
    Every key head serves heads / key_heads heads of values, so `heads` must be a multiple of `key_heads`; and
    `key_heads` of the tensor-parallel size, where there is one.

    Why: head h reads the queries and keys of key head h // (heads / key_heads), on one device.

    Example: `gated_delta_net(heads=32, key_heads=12)`.

    Instead: `key_heads=16`, or any divisor of `heads`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    tp = subject.facts.tp
    for site in subject.sites("gated_delta_net"):
        heads, key_heads = site.f.heads, site.f.key_heads
        if heads % key_heads:
            yield site.problem(
                E208, "`heads` must be a multiple of `key_heads`", ("key_heads", "heads"),
                label=f"{heads} heads cannot be shared by {key_heads}", help=(divide(heads, key_heads),),
            )
        if key_heads % tp:
            yield site.problem(
                E208, "`key_heads` must be a multiple of the tensor-parallel size", ("key_heads",),
                label=f"{key_heads} cannot be split over {tp} devices", help=(f"tp: {divide(key_heads, tp)}",),
            )
