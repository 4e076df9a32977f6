"""E104: causal-conv1d works on channels in eights."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import near, settings
from mambadsl.graph.checks.shard import mamba2_shard
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.mamba2.kind import conv_dim
from mambadsl.text.diagnostic import declare

E104 = declare(
    "E104",
    "the convolution's width is not a multiple of 8",
    """
    For kernels: x, B and C go through one convolution of heads * head_dim + 2 * groups * d_state channels,
    counted on one device. It must be a multiple of 8.

    Why: causal_conv1d reads channels-last rows in blocks of 8 and refuses other strides.

    Example: `mamba2(heads=3, head_dim=20, d_state=16)`: 60 + 32 = 92 channels.

    Instead: `head_dim=24`, or the part set `reference`, which has no such limit.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("mamba2"):
        f = mamba2_shard(site.f, subject.facts.tp)
        if f is None or conv_dim(f) % 8 == 0:
            continue
        legal = near(f.head_dim, lambda p: conv_dim(f.replace(head_dim=p)) % 8 == 0)
        field = "head_dim" if legal else "d_state"
        legal = legal or near(f.d_state, lambda n: conv_dim(f.replace(d_state=n)) % 8 == 0)
        yield site.problem(
            E104, "the width of the convolution must be a multiple of 8 for causal_conv1d",
            ("head_dim", "d_state", "heads", "groups"),
            label=f"{f.heads}*{f.head_dim} + 2*{f.groups}*{f.d_state} = {conv_dim(f)} channels on a device",
            help=(settings(field, legal),) if legal else (),
        )
