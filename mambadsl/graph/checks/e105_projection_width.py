"""E105: rows of in_proj's output start at multiples of 8 elements."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import near, settings
from mambadsl.graph.checks.shard import mamba2_shard
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.mamba2.kind import in_segments
from mambadsl.kinds.values import Values
from mambadsl.text.diagnostic import declare

E105 = declare(
    "E105",
    "the width of in_proj's output is not a multiple of 8",
    """
    For kernels: in_proj makes [z | x | B | C | dt], 2 * heads * head_dim + 2 * groups * d_state + heads
    channels, counted on one device. It must be a multiple of 8; it is where `heads` is.

    Why: causal_conv1d reads x, B and C in place, as rows with that stride, and refuses strides that are no
    multiple of 8. That fails in mamba_ssm before 2.2.5, and in prefill and evaluation of later ones too;
    their fused training path copies instead.

    Example: `mamba2(heads=2, head_dim=64, d_state=128)`: 514 channels.

    Instead: `heads=8`, with a smaller `head_dim` if the width shall stay.
    """,
)


def d_in_proj(f: Values) -> int:
    return sum(width for _, width in in_segments(f))


def check(subject: Subject) -> Iterator[Problem]:
    tp = subject.facts.tp
    for site in subject.sites("mamba2"):
        f = mamba2_shard(site.f, tp)
        if f is None or d_in_proj(f) % 8 == 0:
            continue
        legal = near(f.heads, lambda h: h % f.groups == 0 and d_in_proj(f.replace(heads=h)) % 8 == 0)
        yield site.problem(
            E105, "the width of in_proj's output must be a multiple of 8 for causal_conv1d",
            ("heads", "head_dim", "d_state", "groups"),
            label=f"2*{f.heads}*{f.head_dim} + 2*{f.groups}*{f.d_state} + {f.heads} is {d_in_proj(f)}",
            help=(f"{settings('heads', [h * tp for h in legal])} makes it one",) if legal else (),
        )
