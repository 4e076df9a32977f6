"""Sentences about a plan: why the slowest stage is the slowest, how another split differs, why none fits.

In: a `Pricing` and cuts. Out: text, or the diagnostic E803.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from mambadsl.plan.device import Device
from mambadsl.plan.partition import least_limit, probe
from mambadsl.plan.pricing import Pricing
from mambadsl.plan.schedule import problems
from mambadsl.plan.simulate import program
from mambadsl.plan.unit import Unit
from mambadsl.text.diagnostic import Diagnostic, declare

E803 = declare(
    "E803",
    "no split fits into memory",
    """
    Each rank holds its layers' weights, gradients and optimizer state, the activations of the microbatches
    in flight (`1f1b` keeps as many on a rank as there are ranks from it to the last; `gpipe` keeps all), and
    a receive buffer for every microbatch. The message gives the least memory a rank that would do, and how
    many stages would fit. `recompute` on layers, smaller microbatches and sharded optimizer state help too.
    """,
)

#: Microbatches for each rank where the number is not given: the bubble of 1F1B is then about a fifth.
MICROBATCHES_PER_RANK = 4
#: No larger pipeline is tried for what does not fit.
MOST_RANKS = 64
#: A single layer is the reason if it makes up this part of its stage, and is this much above average.
LARGE_PART, ABOVE_AVERAGE = 0.35, 1.5


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another split. worse_by: 0.013 is 1.3 % slower than the plan, below 0 faster. text: what differs."""

    cuts: tuple[int, ...]
    step_s: float
    worse_by: float
    text: str
    peak_bytes: int


def why_slowest(pricing: Pricing, cuts: Sequence[int], stage: int, *, marked: bool) -> str:
    """One sentence, without the stage's name."""
    if pricing.program.stages == 1:
        return "it is the only stage"
    chain = pricing.chain
    units = chain.units[chain.positions[cuts[stage]] : chain.positions[cuts[stage + 1]]]
    inner = [u for u in chain.units if u.path not in ("embed", "head")] or list(chain.units)
    average = sum(u.total_s for u in inner) / len(inner)
    total = sum(u.total_s for u in units)
    large = max(units, key=lambda u: u.total_s)
    if average and large.total_s >= LARGE_PART * total and large.total_s >= ABOVE_AVERAGE * average:
        what = f" ({large.detail})" if large.detail else ""
        return f"`{large.path}`{what} alone takes as long as {large.total_s / average:.1f} average layers"
    if marked:
        return "the `|` marks in the text put its layers there"
    if len(pricing.program.local_stages[0]) > 1:
        return _rank_sentence(pricing, cuts, stage)
    if reason := _full_neighbours(pricing, cuts, stage):
        return reason
    if len(units) == 1:
        return f"it is a single layer, `{large.path}`"
    last = pricing.program.stages - 1
    at_borders = [unit for unit, inside in ((units[0], stage > 0), (units[-1], stage < last)) if inside]
    smallest = min(at_borders, key=lambda u: u.total_s)
    part = smallest.total_s / total if total else 0.0
    return f"layers are whole: with `{smallest.path}` ({part:.0%} of this stage) next door, the step takes longer"


def _rank_sentence(pricing: Pricing, cuts: Sequence[int], stage: int) -> str:
    """With several stages a rank it is the rank that is busy."""
    chain, program = pricing.chain, pricing.program
    work = [chain.total[b] - chain.total[a] for a, b in itertools.pairwise(cuts)]
    loads = [sum(work[s] for s in here) for here in program.local_stages]
    rank = program.rank_of_stage[stage]
    others = [str(s) for s in program.local_stages[rank] if s != stage]
    mean = sum(loads) / len(loads)
    return (
        f"its rank {rank} also has stage{'s' * (len(others) > 1)} {', '.join(others)}, together "
        f"{loads[rank] / mean if mean else 1:.0%} of the average rank's work"
    )


def _full_neighbours(pricing: Pricing, cuts: Sequence[int], stage: int) -> str | None:
    """If a layer given to a neighbour would not fit there."""
    for neighbour, cut, by in ((stage - 1, stage, 1), (stage + 1, stage + 1, -1)):
        moved = list(cuts)
        if not 0 <= neighbour < pricing.program.stages or cuts[stage + 1] - cuts[stage] < 2:
            continue
        moved[cut] += by
        if pricing.overflow(moved):
            return f"stage {neighbour} has no memory left for one more layer"
    return None


def difference(units: Sequence[Unit], cuts: Sequence[int], other: Sequence[int]) -> str:
    """`other` seen from `cuts`: the layers that change stage."""
    moves = []
    for stage, (a, b) in enumerate(zip(cuts[1:-1], other[1:-1]), 1):
        if a != b:
            low, high = min(a, b), max(a, b)
            what = f"{units[low].path}" if high - low == 1 else f"{units[low].path} to {units[high - 1].path}"
            moves.append(f"{what} in stage {stage if b < a else stage - 1}")
    if len(moves) <= 3:
        return ", ".join(moves)
    return f"{', '.join(moves[:2])}, and {len(moves) - 2} more cuts moved"


def too_large(
    pricing: Pricing, *, schedule: str, device: Device, microbatches: int | None, free: Pricing
) -> Diagnostic:
    """E803 with the least memory that would do, and the number of stages that would fit."""
    stages, each = pricing.program.stages, len(pricing.program.local_stages[0])
    least = least_limit(pricing.chain.total, stages, room=pricing.room()) * each
    where = stages_text(stages // each, each)
    message = (
        f"no split into {where} fits: {_gib(pricing.limit)} a rank on `{device.name}`, "
        f"{_gib(least)} would do"
    )
    help = []
    if pricing is not free and _fits(free):
        help.append("it fits if the planner cuts: take the `|` out")
    enough = _enough_ranks(free, schedule=schedule, device=device, microbatches=microbatches)
    what = "ranks" if each > 1 else "stages"
    help.append(f"{enough} {what} would fit" if enough else f"more {what} do not help")
    kept = 1 - pricing.chain.static[-1] * each / stages / least if least else 0.0
    if kept > 0.5:
        fewer = "fewer or shorter microbatches" if microbatches is not None else "shorter microbatches"
        help.append(f"about {kept:.0%} is for microbatches in flight: `recompute`, or {fewer}")
    if schedule == "gpipe":
        help.append("`1f1b` keeps fewer microbatches in memory")
    return Diagnostic(E803, message, help=tuple(help))


def _enough_ranks(pricing: Pricing, *, schedule: str, device: Device, microbatches: int | None) -> int | None:
    """The least number of ranks above this one's on which a split fits, looked for in growing steps; None if
    there is none."""
    ranks, each = len(pricing.program.lasts), len(pricing.program.local_stages[0])
    most = min(MOST_RANKS, pricing.chain.blocks // each)

    def fit(n: int) -> bool:
        count = MICROBATCHES_PER_RANK * n if microbatches is None else microbatches
        # As many microbatches as fill the pipeline show how many are kept; only GPipe keeps all of them.
        seen = count if schedule == "gpipe" else min(count, 2 * n)
        if any(problems(schedule, ranks=n, virtual=each, microbatches=m) for m in (count, seen)):
            return False
        run = program(schedule, ranks=n, virtual=each, microbatches=seen)
        return _fits(Pricing(run, pricing.chain, device=device, microbatches=count, limit=pricing.limit))

    tried = ranks
    while tried < most:
        following = min(most, tried + max(1, tried // 4))
        if fit(following):
            return next(n for n in range(tried + 1, following + 1) if n == following or fit(n))
        tried = following
    return None


def _fits(pricing: Pricing) -> bool:
    chain, stages = pricing.chain, pricing.program.stages
    free = [0.0] * (chain.blocks + 1)
    return probe(chain.total, stages, edge=free, room=pricing.room(), bound=inf) is not None


def stages_text(ranks: int, each: int) -> str:
    """`4 stages`, `1 stage`, `4 ranks with 2 stages each`."""
    if each > 1:
        return f"{ranks} rank{'s' * (ranks != 1)} with {each} stages each"
    return f"{ranks} stage{'s' * (ranks != 1)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"
