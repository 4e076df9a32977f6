"""The search: from exact seeds, on the simulator, to the split with the smallest step time.

In: a `Pricing`. Out: `Found`, the best cuts and the next best. Refuses nothing: no fitting split is None.

Seeds (see partition.py) are improved by shifting runs of neighbouring cuts, then annealing leaves what local
moves cannot, then local moves again. Every simulated split leaves its critical path as a plane: a lower bound
for every other split, far cheaper than a simulation. A candidate that some recent plane already shows to be
no better is not simulated. The fastest are then compared by what they take beside transfers too, which no
plane can tell.

Work is counted in visited simulator operations, never in seconds, and the random numbers are seeded: the same
input gives the same plan everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf, log
from operator import mul

from mambadsl.plan.partition import fold_loop, fold_v, min_max
from mambadsl.plan.pricing import Pricing
from mambadsl.plan.simulate import step_plane, timeline


@dataclass(frozen=True, slots=True)
class Effort:
    """work: visited simulator operations in all (seeds may exceed it on long chains). rounds of annealing,
    each of so many steps. Worse by `hot` (at a round's end `cold`) parts of the step time is accepted with a
    chance of 1/e."""

    work: int
    rounds: int
    steps: int
    hot: float = 0.08
    cold: float = 0.0002


#: With one stage a rank the seeds are within a percent of the best, and 0.05 s of search is enough. Several
#: stages a rank leave more to find (a percent between 0.1 s and 0.4 s on 54 layers).
ONE_EACH = Effort(work=120_000, rounds=3, steps=1500)
SEVERAL_EACH = Effort(work=1_000_000, rounds=3, steps=3000)

#: The exact rank balance is only tried where it costs less than this many inner steps.
FOLD_STEPS = 1_000_000
#: Splits tried to get one that fits into memory, and how many of them at random where descent is stuck.
REPAIRS, WANDER = 6000, 600
PLANES = 12
#: Splits that are compared again where layers take longer beside transfers.
AGAIN = 12
#: What looking at a candidate costs, in simulator operations, besides two for each stage.
CONSIDER = 40
SEED = 20260


@dataclass(frozen=True, slots=True)
class Found:
    """Cut positions and step time (picoseconds) of the best split and of the next best (None: there is no
    other); simulated: how many splits ran through the simulator, considered: how many were looked at."""

    cuts: tuple[int, ...]
    step: float
    next_cuts: tuple[int, ...] | None
    next_step: float | None
    simulated: int
    considered: int


def search(pricing: Pricing) -> Found | None:
    """The best split found that fits into memory; None if none was found."""
    several = pricing.program.stages > len(pricing.program.lasts)
    run = _Search(pricing, SEVERAL_EACH if several else ONE_EACH)
    starts = [cuts for cuts in map(run.repair, dict.fromkeys(seeds(pricing))) if cuts is not None]
    if not starts:
        return None
    starts.sort(key=run.simulate)
    for cuts in starts:
        run.descend(cuts)
    for _ in range(run.effort.rounds):
        run.anneal()
        run.descend(run.best[2])
    run.look_around()
    (step, _, cuts), (other, _, others) = run.again() if pricing.beside > 1 else (run.best, run.second)
    return Found(cuts, step, others or None, other if others else None, len(run.seen), run.considered)


def seeds(pricing: Pricing) -> list[tuple[int, ...]]:
    """Splits that are best by simpler measures: the slowest stage (with and without transfers), the busiest
    rank. With one stage a rank they fit into memory, and there is none only if nothing fits."""
    chain, program = pricing.chain, pricing.program
    room, stages, ranks = pricing.room(), program.stages, len(program.lasts)
    found = []
    for edge in (None, chain.transfer):
        split = min_max(chain.total, stages, edge=edge, room=room)
        if split is None and stages > ranks:
            split = min_max(chain.total, stages, edge=edge)
        if split is not None:
            found.append(tuple(split[1]))
    v = program.rank_of_stage[-1] == 0 and ranks > 1
    if stages == 2 * ranks and ranks > 1:
        inner = ranks * chain.blocks**2 * (1 if v else chain.blocks // 4 + 1)
        if inner * 8 <= FOLD_STEPS:
            fold = fold_v if v else fold_loop
            found.append(_spread(fold(chain.total, ranks)[1]))
    return found


def _spread(cuts: list[int]) -> tuple[int, ...]:
    """The nearest cuts with a block in every stage."""
    n, stages = cuts[-1], len(cuts) - 1
    out = [0]
    for stage, cut in enumerate(cuts[1:], 1):
        out.append(min(max(cut, out[-1] + 1), n - (stages - stage)))
    return tuple(out)


class _Search:
    def __init__(self, pricing: Pricing, effort: Effort) -> None:
        self.pricing, self.effort = pricing, effort
        self.stages = pricing.program.stages
        self.seen: dict[tuple[int, ...], float] = {}
        self.planes: list[list[int]] = []
        # Step time, peak bytes, cuts: of equally fast splits, the one that needs less memory.
        self.best: tuple[float, int, tuple[int, ...]] = inf, 0, ()
        self.second = self.best
        self.work = self.considered = 0
        self.random = random.Random(SEED).random
        blocks = pricing.chain.blocks
        largest = max(1, blocks // (4 * self.stages))
        self.sizes = [1 << k for k in range(largest.bit_length())][::-1]
        self.runs = list(_runs(self.stages))

    def simulate(self, cuts: tuple[int, ...], vector: list[float] | None = None) -> float:
        """The step time of a split that fits, from memory if it ran before."""
        found = self.seen.get(cuts)
        if found is not None:
            return found
        step, plane = step_plane(self.pricing.program, vector or self.pricing.durations(cuts))
        self.work += len(self.pricing.program.ops)
        self.seen[cuts] = step
        self.planes.insert(0, plane)
        del self.planes[PLANES:]
        if step <= self.second[0]:
            entry = step, max(self.pricing.peaks(cuts)), cuts
            if entry < self.best:
                self.best, self.second = entry, self.best
            else:
                self.second = min(self.second, entry)
        return step

    def below(self, cuts: tuple[int, ...], vector: list[float], bound: float) -> float | None:
        """The step time if it is below the bound, else None."""
        found = self.seen.get(cuts)
        if found is None:
            self.considered += 1
            self.work += CONSIDER + 2 * self.stages
            for n, plane in enumerate(self.planes):
                if sum(map(mul, plane, vector)) >= bound:
                    if n:
                        self.planes.insert(0, self.planes.pop(n))
                    return None
            if self.pricing.overflow(cuts):
                return None
            found = self.simulate(cuts, vector)
        return found if found < bound else None

    def moved(
        self, cuts: Sequence[int], vector: list[float], run: tuple[int, int], by: int
    ) -> tuple[tuple[int, ...], list[float]] | None:
        """The split with a run of cuts shifted, and its durations; None if a stage would be empty."""
        shifted = _shifted(cuts, run, by)
        if shifted is None:
            return None
        durations = vector.copy()
        self.pricing.revise(durations, shifted, run[0] - 1, run[1] + 1)
        return shifted, durations

    def descend(self, cuts: tuple[int, ...]) -> None:
        """Takes improving shifts, large ones first, until none is left or the work is done."""
        step, vector = self.simulate(cuts), self.pricing.durations(cuts)
        moves = [(run, by * sign) for by in self.sizes for run in self.runs for sign in (-1, 1)]
        quiet, at = 0, 0
        while quiet < len(moves) and self.work < self.effort.work:
            run, by = moves[at]
            candidate = self.moved(cuts, vector, run, by)
            better = candidate and self.below(*candidate, step)
            if better is None or candidate is None:
                quiet, at = quiet + 1, (at + 1) % len(moves)
            else:
                (cuts, vector), step, quiet = candidate, better, 0

    def anneal(self) -> None:
        """Random shifts from the best split, worse ones accepted with a falling chance."""
        effort, (step, _, cuts) = self.effort, self.best
        vector = self.pricing.durations(cuts)
        draw, runs, sizes = self.random, self.runs, self.sizes
        for k in range(effort.steps if runs else 0):
            if self.work >= self.effort.work:
                break
            heat = step * effort.hot * (effort.cold / effort.hot) ** (k / effort.steps)
            run = runs[int(draw() * len(runs))]
            size = sizes[-1 - int(draw() ** 2 * len(sizes))]
            candidate = self.moved(cuts, vector, run, size if draw() < 0.5 else -size)
            found = candidate and self.below(*candidate, step - heat * log(1 - draw()))
            if found is not None and candidate is not None:
                (cuts, vector), step = candidate, found

    def look_around(self) -> None:
        """Every single shift of the best split that could be the next best; on long chains, some of them."""
        _, _, cuts = self.best
        vector = self.pricing.durations(cuts)
        for run in self.runs:
            for by in (-1, 1):
                if self.work >= 2 * self.effort.work:
                    return
                if candidate := self.moved(cuts, vector, run, by):
                    self.below(*candidate, self.second[0])

    def again(self) -> list[tuple[float, int, tuple[int, ...]]]:
        """The best and the next best of the fastest, by their whole times."""
        price = self.pricing
        found = [
            (timeline(price.program, price.durations(cuts), beside=price.beside).step, max(price.peaks(cuts)), cuts)
            for _, cuts in nsmallest(AGAIN, ((step, cuts) for cuts, step in self.seen.items()))
        ]
        return [*sorted(found), (inf, 0, ())][:2]

    def repair(self, cuts: tuple[int, ...]) -> tuple[int, ...] | None:
        """A split that fits, by shifts that shrink what exceeds the memory limit; where none does, by random
        ones for a while. None if it stays too large."""
        over = self.pricing.overflow(cuts)
        moves = [(run, by * sign) for by in self.sizes for run in self.runs for sign in (-1, 1)]
        draw, left = self.random, REPAIRS
        while over and left > 0:
            for run, by in moves:
                shifted = _shifted(cuts, run, by)
                left -= 1
                if shifted and (less := self.pricing.overflow(shifted)) < over:
                    cuts, over = shifted, less
                    break
            else:
                # Stuck: wander, allowing for splits that are worse by less and less.
                for k in range(WANDER if moves else 0):
                    left -= 1
                    shifted = _shifted(cuts, *moves[int(draw() * len(moves))])
                    heat = over * 0.5 * (1 - k / WANDER)
                    if shifted and (other := self.pricing.overflow(shifted)) < over - heat * log(1 - draw()):
                        cuts, over = shifted, other
                        if not over:
                            break
                if not moves:
                    break
        return None if over else cuts


def _shifted(cuts: Sequence[int], run: tuple[int, int], by: int) -> tuple[int, ...] | None:
    """The cuts with a run of them moved; None if a stage would be empty."""
    first, last = run
    if (cuts[first] + by <= cuts[first - 1]) if by < 0 else (cuts[last] + by >= cuts[last + 1]):
        return None
    return (*cuts[:first], *[cut + by for cut in cuts[first : last + 1]], *cuts[last + 1 :])


def _runs(stages: int) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring cuts, short ones first; with many stages, only some of the long ones."""
    length = 1
    while length < stages:
        for first in range(1, stages - length + 1):
            yield first, first + length - 1
        length += 1 if length < 8 else length // 4
