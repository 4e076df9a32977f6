"""E216: without `head_dim`, heads of attention share d_model evenly."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E216 = declare(
    "E216",
    "`heads` does not divide d_model",
    """
    An attention layer without `head_dim` gets d_model / heads channels a head, which must be whole.

    Why: rounding would make the layer narrower than d_model without a word.

    Example: `d_model = 1024` and `attention(heads=12)`.

    Instead: `heads=16`, or say it: `attention(heads=12, head_dim=64)`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    d_model = subject.graph.model.d_model
    for site in subject.sites("attention", "cca"):
        if site.defaulted("head_dim") and d_model % site.f.heads:
            yield site.problem(
                E216, "`heads` must divide d_model where `head_dim` is not given", ("heads",),
                label=f"{d_model} channels cannot be split into {site.f.heads} heads",
                labels=subject.setting_label("d_model"),
                help=(divide(d_model, site.f.heads), f"or say `head_dim={max(1, d_model // site.f.heads)}`"),
            )
