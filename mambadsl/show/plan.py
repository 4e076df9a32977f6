"""A plan as text: a table with a line for each stage, and sentences on what limits it.

In: a `Plan`. Out: plain text, at most 110 columns wide.
"""

from __future__ import annotations

from collections.abc import Sequence

from mambadsl.plan.explain import Alternative
from mambadsl.plan.plan import Plan, Stage
from mambadsl.show.units import count, size
from mambadsl.syntax.fold import fold

WIDTH = 110
HEADER = ("stage", "layers", "pattern", "params", "memory", "forward", "backward", "share", "")
LEFT, PATTERN = 3, 2


def plan_text(plan: Plan) -> str:
    """The table and the sentences below it."""
    rows = [_row(plan, stage) for stage in plan.stages]
    others = sum(2 + max(len(row[n]) for row in [HEADER, *rows]) for n in range(len(HEADER)) if n != PATTERN)
    room = max(12, WIDTH - others)
    rows = [(*row[:PATTERN], _short(row[PATTERN], room), *row[PATTERN + 1 :]) for row in rows]
    widths = [max(len(row[n]) for row in [HEADER, *rows]) for n in range(len(HEADER))]
    table = [
        "  ".join(
            cell.ljust(width) if n < LEFT or n == len(HEADER) - 1 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [HEADER, *rows]
    ]
    return "\n".join([_title(plan), "", *table, "", *_sentences(plan)]) + "\n"


def _title(plan: Plan) -> str:
    shape = f"{len(plan.stages)} stage{'s' * (len(plan.stages) > 1)}"
    if plan.virtual > 1:
        shape = f"{plan.ranks} ranks x {plan.virtual} stages ({'V' if plan.placement == 'v' else 'loop'})"
    batch = f"{plan.microbatches} microbatches" + ("" if plan.microbatches_given else " (4 a rank, chosen)")
    cuts = "cut by the text's `|`" if plan.cuts_given else "cut by the planner"
    return f"{shape}, {cuts}   {plan.schedule}, {batch}   {plan.device}"


def _row(plan: Plan, stage: Stage) -> tuple[str, ...]:
    name = str(stage.index) if plan.virtual == 1 else f"{stage.index} @{stage.rank}"
    memory = stage.static_bytes + stage.in_flight * stage.activation_bytes + stage.buffer_bytes
    mark = "<- slowest" if stage.index == plan.slowest and len(plan.stages) > 1 else ""
    return (
        name, layers(stage.paths), fold(list(stage.labels)), count(stage.params), size(memory),
        time(stage.forward_s), time(stage.backward_s), f"{stage.share:.0%}", mark,
    )


def _sentences(plan: Plan) -> list[str]:
    worst = max(range(plan.ranks), key=lambda rank: plan.peak_bytes[rank])
    peak = plan.peak_bytes[worst]
    where = f"rank {worst}" if plan.virtual > 1 else f"stage {worst}"
    part = f"{peak / plan.memory_limit:.0%}"
    lines = [
        ("step", f"{time(plan.step_s)} predicted for forwards and backwards, bubble {plan.bubble:.1%}"),
        ("memory", f"{size(peak)} at the most, on {where}: {part} of the limit of {size(plan.memory_limit)}"),
        ("slowest", f"stage {plan.slowest}: {plan.why}"),
    ]
    if plan.next_best:
        lines.append(("next best", f"{_compared(plan.next_best)}: {plan.next_best.text}"))
    if plan.own_cuts:
        better = _compared(plan.own_cuts) if plan.own_cuts.text else "the same cuts"
        lines.append(("without `|`", better + (f": {plan.own_cuts.text}" if plan.own_cuts.text else "")))
    for owner, stages in plan.replicas:
        held = ", ".join(map(str, stages))
        lines.append(("copies", f"the weights of `{owner}` are on stages {held}; their gradients are summed"))
    return [line for head, text in lines for line in _wrapped(head, text)]


def _compared(other: Alternative) -> str:
    by = other.worse_by
    how = "as fast" if abs(by) < 5e-5 else f"{abs(by):.2%} {'slower' if by > 0 else 'faster'}"
    return f"{how} ({time(other.step_s)})"


def _wrapped(head: str, text: str) -> list[str]:
    import textwrap

    lines = textwrap.wrap(text, WIDTH - 13, break_long_words=False) or [""]
    return [f"{head if not n else '':<11}  {line}" for n, line in enumerate(lines)]


def layers(paths: Sequence[str]) -> str:
    """`embed stack.0-10`: runs of numbered paths joined."""
    runs: list[list] = []
    for path in paths:
        stem, _, number = path.rpartition(".")
        if runs and number.isdigit() and runs[-1][0] == stem and runs[-1][2] == int(number) - 1:
            runs[-1][2] = int(number)
        else:
            runs.append([stem, int(number), int(number)] if number.isdigit() and stem else [path, None, None])
    return " ".join(
        stem if low is None else f"{stem}.{low}" if low == high else f"{stem}.{low}-{high}"
        for stem, low, high in runs
    )


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 4].rstrip() + " ..."


def time(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            value = seconds / scale
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError
