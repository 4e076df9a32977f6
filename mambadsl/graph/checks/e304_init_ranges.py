"""E304: ranges of initial values are not empty."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E304 = declare(
    "E304",
    "a range of initial values is empty",
    """
    Initial values of a recurrent layer come from ranges: dt_floor <= dt_min < dt_max, and `a_range` and `radius`,
    [low, high] with low <= high.

    Why: drawn from an empty range, they start as NaN or all equal, and training fails much later.

    Example: `mamba2(dt_min=0.1, dt_max=0.001)`.

    Instead: `mamba2(dt_min=0.001, dt_max=0.1)`.
    """,
)


#: Fields that are [low, high].
RANGES = "a_range", "radius"


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites():
        f = site.f
        for name in RANGES:
            low, high = f.get(name, (0, 0))
            if low > high:
                yield site.problem(
                    E304, f"`{name}` must be [low, high] with low at most high", (name,),
                    label=f"from {low} to {high} is empty", help=(f"`{name}=[{high}, {low}]`",),
                )
        if "dt_min" not in f:
            continue
        if f.dt_min >= f.dt_max:
            yield site.problem(
                E304, "`dt_min` must be less than `dt_max`", ("dt_min", "dt_max"),
                label=f"from {f.dt_min} to {f.dt_max} is empty",
                help=(f"`dt_min={f.dt_max}, dt_max={f.dt_min}`",) if f.dt_min > f.dt_max else (),
            )
        if f.dt_floor > f.dt_min:
            yield site.problem(
                E304, "`dt_floor` must be at most `dt_min`", ("dt_floor", "dt_min"),
                label=f"{f.dt_floor} is above {f.dt_min}", help=(f"`dt_floor={f.dt_min}` is the most",),
            )
