"""E114: a row of the gated norm fits into 64 KiB."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import near, settings
from mambadsl.graph.checks.shard import mamba2_shard
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.mamba2.kind import d_inner
from mambadsl.text.diagnostic import declare

E114 = declare(
    "E114",
    "a group of the gated norm is too wide",
    """
    For kernels: a group of channels that the gated norm works on has at most 64 KiB, 32,768 channels in
    bf16.

    Why: mamba_ssm's norm kernel holds a whole group in one block and refuses larger ones.

    Example: `mamba2(heads=1024, head_dim=64, norm_groups=1)`: 65,536 channels.

    Instead: more norm groups, for instance `norm_groups=8`; or tensor parallelism.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    limit = 65_536 // facts.dtype_bytes
    for site in subject.sites("mamba2"):
        f = mamba2_shard(site.f, facts.tp)
        if f is None or f.gated_norm == "none":
            continue
        groups = max(1, site.f.norm_groups // facts.tp)
        width = d_inner(f) // groups
        if width > limit:
            legal = near(groups, lambda g: d_inner(f) % g == 0 and d_inner(f) // g <= limit, reach=4096)
            yield site.problem(
                E114, f"a group of the gated norm has at most {limit:,} channels in {facts.dtype}",
                ("norm_groups", "groups", "heads", "head_dim"), label=f"{width:,} channels",
                help=(settings("norm_groups", [g * facts.tp for g in legal[-1:]]),) if legal else (),
            )
