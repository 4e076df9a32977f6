"""E204: query heads are shared evenly by key/value heads, and split evenly over devices."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.values import NONE
from mambadsl.text.diagnostic import declare

E204 = declare(
    "E204",
    "the heads of attention do not divide",
    """
    Every key/value head serves heads / kv_heads query heads, so `heads` must be a multiple of `kv_heads`; and
    of the tensor-parallel size, where there is one. Differential attention takes one half of the heads from the
    other, so both are even; of `cca`, half of the values' channels, kv_heads * head_dim, are the token's before.

    Why: query head h reads key/value head h // (heads / kv_heads); no kernel takes unequal shares.

    Example: `attention(heads=32, kv_heads=12)`.

    Instead: `kv_heads=8`, or any divisor of `heads`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    tp = subject.facts.tp
    for site in subject.sites("attention", "mla", "cca"):
        heads, kv_heads = site.f.heads, site.f.get("kv_heads", 1)
        if heads % kv_heads:
            yield site.problem(
                E204, "`heads` must be a multiple of `kv_heads`", ("kv_heads", "heads"),
                label=f"{heads} heads cannot be shared by {kv_heads}", help=(divide(heads, kv_heads),),
            )
        differential = site.f.get("differential", NONE)
        halved = ("heads", "kv_heads") if differential.name == "halves" else ()
        if odd := [name for name in halved if site.f[name] % 2]:
            yield site.problem(
                E204, "differential attention halves `heads` and `kv_heads`", (*odd, "differential"),
                label=f"{site.f[odd[0]]} has no half", help=(f"`{odd[0]}={site.f[odd[0]] + 1}`",),
            )
        if heads % tp:
            yield site.problem(
                E204, "`heads` must be a multiple of the tensor-parallel size", ("heads",),
                label=f"{heads} cannot be split over {tp} devices", help=(f"tp: {divide(heads, tp)}",),
            )
    for site in subject.sites("cca"):
        kv_heads, head_dim = site.f.kv_heads, site.f.head_dim
        if kv_heads * head_dim % 2:
            yield site.problem(
                E204, "half of the values' channels are the previous token's", ("kv_heads", "head_dim"),
                label=f"{kv_heads} * {head_dim} have no half", help=(f"`head_dim={head_dim + 1}`",),
            )
