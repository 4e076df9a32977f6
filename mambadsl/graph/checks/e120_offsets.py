"""E120: offsets into in_proj's output fit into 32 bits."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.e105_projection_width import d_in_proj
from mambadsl.graph.checks.shard import MAX_OFFSET, mamba2_shard
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E120 = declare(
    "E120",
    "in_proj's output is too large for 32-bit offsets",
    """
    For kernels: batch * length * (width of in_proj's output on a device) is at most 2^31 - 1.

    Why: the Triton kernels compute offsets into that tensor in 32 bits. Beyond, they read and write wrong
    places without an error.

    Example: heads=256, head_dim=64, groups=8, d_state=128 (35,072 channels) at batch 1 and length 65,536.

    Instead: length 61,000, a smaller batch, or tensor or context parallelism over 2 devices.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    batch, length, facts = subject.facts.batch, -(-subject.length // subject.facts.cp), subject.facts
    for site in subject.sites("mamba2"):
        f = mamba2_shard(site.f, facts.tp)
        if f is None or (elements := batch * length * d_in_proj(f)) <= MAX_OFFSET:
            continue
        tokens = MAX_OFFSET // d_in_proj(f)
        parts = -(-elements // MAX_OFFSET)
        help = [f"tensor or context parallelism over {parts} times as many devices"]
        if tokens // batch:
            help.insert(0, f"at batch {batch}, a length of at most {tokens // batch:,}")
        if tokens // length:
            help.insert(0, f"at length {length:,}, a batch of at most {tokens // length:,}")
        yield site.problem(
            E120, "in_proj's output has at most 2^31 - 1 elements in the kernels", ("heads", "head_dim"),
            label=f"{batch} * {length:,} * {d_in_proj(f):,} = {elements:,} elements (batch * length * width)",
            help=tuple(help),
        )
