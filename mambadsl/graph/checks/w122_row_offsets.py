"""W122: offsets into other wide rows fit into 32 bits."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.shard import MAX_OFFSET
from mambadsl.graph.checks.subject import Problem, Site, Subject
from mambadsl.kinds.mamba2.kind import d_inner
from mambadsl.text.diagnostic import declare

W122 = declare(
    "W122",
    "a tensor is too large for the 32-bit offsets of some kernels",
    """
    For kernels: batch * length * (widest row on a device) should be at most 2^31 - 1: the gated norm's input,
    and the hidden values of a gated feed-forward layer.

    Why: the norm and activation kernels of some mamba_ssm versions compute row offsets in 32 bits.

    Example: a gated `mlp(d_ff=32768)` at batch 1 and length 65,536.

    Instead: a smaller batch, a shorter sequence, or tensor or context parallelism.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    tokens = facts.batch * -(-subject.length // facts.cp)
    for site in subject.sites("mamba2", "mlp"):
        width, fields = _row(site)
        elements = tokens * width // facts.tp
        if elements > MAX_OFFSET:
            yield site.problem(
                W122, "rows of this layer should have at most 2^31 - 1 elements together", fields,
                label=f"{tokens:,} tokens * {width // facts.tp:,} channels = {elements:,}",
                help=(f"at most {MAX_OFFSET * facts.tp // width:,} tokens at once",),
            )


def _row(site: Site) -> tuple[int, tuple[str, ...]]:
    if site.mixer.kind == "mamba2":
        return (d_inner(site.f) if site.f.gated_norm != "none" else 0), ("heads", "head_dim")
    return (2 * site.f.d_ff if site.f.gated else 0), ("d_ff",)
