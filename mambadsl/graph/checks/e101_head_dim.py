"""E101: without `heads`, the inner width 2 * d_model must hold whole Mamba-2 heads."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divisors_near, listed, multiples_near, settings
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E101 = declare(
    "E101",
    "the inner width is not a multiple of `head_dim`",
    """
    A Mamba-2 layer without `heads` gets as many as fit into an inner width of 2 * d_model. They must fit
    without a rest.

    Why: the layer would silently be narrower than 2 * d_model; mamba_ssm fails much later, on the GPU.

    Example: `d_model = 16` and `mamba2(head_dim=64)`: the inner width is 32.

    Instead: `head_dim=32`, or `d_model = 32`, or say how many heads: `heads=1` (then d_inner is heads *
    head_dim, free of d_model).
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    d_model = subject.graph.model.d_model
    for site in subject.sites("mamba2"):
        wide, head_dim = 2 * d_model, site.f.head_dim
        if not site.defaulted("heads") or wide % head_dim == 0:
            continue
        step = head_dim // 2 if head_dim % 2 == 0 else head_dim
        smaller = [d for d in divisors_near(wide, head_dim) if 8 <= d < head_dim] or [wide]
        wider = multiples_near(d_model, step)
        yield site.problem(
            E101, "the inner width 2 * d_model must be a multiple of `head_dim`", ("head_dim",),
            label=f"{wide} channels are no whole number of heads with {head_dim} each",
            labels=subject.setting_label("d_model"),
            help=(
                f"{settings('head_dim', smaller[-1:])}, or d_model = {listed(wider, word='or')}",
                "`heads=` gives the number of heads, and d_inner = heads * head_dim",
            ),
        )
