"""E218: the frequencies between which rope's scaling fades are ordered."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E218 = declare(
    "E218",
    "the bounds of rope's scaling are in the wrong order",
    """
    `llama3` scaling fades between `low_freq_factor` and `high_freq_factor`, `yarn` between `beta_slow` and
    `beta_fast`: the first must be less than the second.

    Why: with equal bounds the fade divides by zero; exchanged, it scales the wrong half.

    Example: `llama3(factor=8, low_freq_factor=4, high_freq_factor=1)`.

    Instead: `llama3(factor=8, low_freq_factor=1, high_freq_factor=4)`.
    """,
)
BOUNDS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.attending():
        scaling = site.f.rope.values.get("scaling")
        if scaling is None or scaling.name not in BOUNDS:
            continue
        low, high = BOUNDS[scaling.name]
        if scaling.values[low] >= scaling.values[high]:
            yield site.problem(
                E218, f"`{low}` must be less than `{high}`", ("rope",),
                label=f"{low} is {scaling.values[low]}, {high} is {scaling.values[high]}",
            )
