"""E121: offsets into the Mamba-1 scan's saved states fit into 32 bits."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.shard import MAX_OFFSET
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E121 = declare(
    "E121",
    "the Mamba-1 scan's states are too many for 32-bit offsets",
    """
    For kernels: batch * d_inner * ceil(length / 2048) * d_state is at most 2^31 - 1, counted on a device.

    Why: the selective scan saves one state for every 2,048 tokens and computes offsets to them in 32 bits.

    Example: d_inner=16,384 and d_state=256 at length 2,000,000.

    Instead: shorter sequences, a smaller batch, or tensor parallelism.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    chunks = -(-subject.length // 2048)
    for site in subject.sites("mamba1"):
        channels = site.f.d_inner // facts.tp
        states = facts.batch * channels * chunks * site.f.d_state
        if states > MAX_OFFSET:
            most = MAX_OFFSET // (facts.batch * channels * site.f.d_state) * 2048
            yield site.problem(
                E121, "the Mamba-1 scan saves at most 2^31 - 1 numbers in the kernel", ("d_state", "d_inner"),
                label=f"{facts.batch} * {channels:,} * {chunks:,} * {site.f.d_state} = {states:,}",
                help=(f"a length of at most {most:,}" if most else "a smaller batch",),
            )
