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
        low, high = site.f.dt_limit
        low_text = "inf" if low is None else low
        if low is None or (high is not None and low >= high):
            swapped = f"`dt_limit=[{high}, {low_text}]`" if high != low else "`dt_limit=[0, inf]` for no limit"
            yield site.problem(
                E125, "`dt_limit` must be [low, high] with low below high", ("dt_limit",),
                label=f"from {low_text} to {'inf' if high is None else high} is empty",
                help=(swapped if high is not None or low is not None else "`dt_limit=[0, inf]`",),
            )
