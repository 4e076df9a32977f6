"""E125: the range that dt is clamped to is not empty."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E125 = declare(
    "E125",
    "`dt_limit` is an empty range",
    """
    `dt_limit=[low, high]` clamps dt after softplus; low must be less than high.

    Why: with low above high every dt would be `high`, whatever the input.

    Example: `mamba2(dt_limit=[0.1, 0.001])`.

    Instead: `dt_limit=[0.001, 0.1]`, or `[0, inf]` for no limit.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("mamba2"):
        low, high = (float("inf") if limit is None else limit for limit in site.f.dt_limit)
        if low >= high:
            legal = f"`dt_limit=[{high}, {low}]`" if low > high else "`dt_limit=[0, inf]` sets no limit"
            yield site.problem(
                E125, "`dt_limit` must be [low, high] with low below high", ("dt_limit",),
                label=f"from {low} to {high} is empty", help=(legal,),
            )
