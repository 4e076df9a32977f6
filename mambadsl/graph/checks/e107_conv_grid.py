"""E107: causal-conv1d takes fewer than 65,536 channels."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.shard import mamba2_shard
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.mamba2.kind import conv_dim
from mambadsl.text.diagnostic import declare

E107 = declare(
    "E107",
    "too many convolution channels for one kernel",
    """
    For kernels: a device must have fewer than 65,536 channels of a convolution.

    Why: causal_conv1d puts channels on a CUDA grid axis that ends there.

    Example: `mamba2(heads=1024, head_dim=64)` on one device.

    Instead: split the layer (`tp=2`), or use fewer heads.
    """,
)
LIMIT = 65_536


def check(subject: Subject) -> Iterator[Problem]:
    tp = subject.facts.tp
    for site in subject.sites("mamba1", "mamba2"):
        if site.mixer.kind == "mamba1":
            channels, fields = site.f.d_inner // tp, ("d_inner",)
        else:
            f = mamba2_shard(site.f, tp)
            channels, fields = (conv_dim(f) if f else 0), ("heads", "head_dim", "groups", "d_state")
        if channels >= LIMIT:
            yield site.problem(
                E107, f"a convolution has fewer than {LIMIT:,} channels on one device", fields,
                label=f"{channels:,} channels with tp={tp}",
                help=(f"tensor parallelism over {tp * (channels // (LIMIT - 1) + 1)} devices splits them",),
            )
