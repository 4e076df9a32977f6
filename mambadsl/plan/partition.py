"""Exact splits of a chain, without the simulator: the seeds of the search.

In: prefix sums over the legal cut positions 0..n. Out: cut positions [0, ..., n], or None if nothing fits.

`min_max` makes the slowest stage as fast as can be. A probe asks whether a bound can be kept: it walks the
positions that s stages can end at, inside windows that a greedy walk from both ends leaves open, so it is
exact also where boundaries cost (then a longer stage may be cheaper than a shorter one and greedy alone
fails), and nearly linear where they are narrow. Bisection brackets the bound; a last probe for something
strictly better proves it. Chains-on-chains: Pinar and Aykanat 2004.

`fold_v` and `fold_loop` balance ranks instead, when each rank has two stages: r and 2p-1-r, or r and p+r. Of
all ways to fill the first ranks, only the one that leaves the least matters, for each end of the first stage.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, nextafter

RELATIVE_GAP = 1e-9


@dataclass(frozen=True, slots=True)
class Room:
    """A second limit on stage s over positions a..b: solid(s, a, b) + edge[a] + edge[b] <= limit. `solid`
    must not shrink when the stage grows."""

    solid: Callable[[int, int, int], float]
    edge: Sequence[float]
    limit: float

    def holds(self, stage: int, a: int, b: int) -> bool:
        return self.solid(stage, a, b) + self.edge[a] + self.edge[b] <= self.limit


def min_max(
    prefix: Sequence[float], stages: int, *, edge: Sequence[float] | None = None, room: Room | None = None
) -> tuple[float, list[int]] | None:
    """The least `max over stages of prefix[b] - prefix[a] + edge[a] + edge[b]`, and cuts that reach it."""
    n = len(prefix) - 1
    if n < stages:
        return None
    edge = edge or [0.0] * (n + 1)
    low = max((prefix[n] - prefix[0]) / stages, max(b - a for a, b in itertools.pairwise(prefix)))
    top = prefix[n] - prefix[0] + 2 * max(edge)
    gap, cuts = 1e-4, probe(prefix, stages, edge=edge, room=room, bound=low)
    bound = low
    while cuts is None:
        if bound >= top:
            return None
        low, bound, gap = bound, min(top, bound * (1 + gap) if bound else top), gap * 8
        cuts = probe(prefix, stages, edge=edge, room=room, bound=bound)
    high = bottleneck(prefix, cuts, edge=edge)
    while high - low > RELATIVE_GAP * high:
        middle = (low + high) / 2
        better = probe(prefix, stages, edge=edge, room=room, bound=middle)
        if better is None:
            low = middle
        else:
            cuts, high = better, bottleneck(prefix, better, edge=edge)
    while better := probe(prefix, stages, edge=edge, room=room, bound=nextafter(high, -inf)):
        cuts, high = better, bottleneck(prefix, better, edge=edge)
    return high, cuts


def bottleneck(prefix: Sequence[float], cuts: Sequence[int], *, edge: Sequence[float]) -> float:
    """The slowest stage of a split."""
    return max(prefix[b] - prefix[a] + edge[a] + edge[b] for a, b in itertools.pairwise(cuts))


def least_limit(prefix: Sequence[float], stages: int, *, room: Room) -> float:
    """The least limit (to one part in a thousand, never below what does) under which some split exists."""
    n = len(prefix) - 1
    low, high = 0.0, max(room.solid(s, 0, n) for s in range(stages)) + 2 * max(room.edge)
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        tried = Room(room.solid, room.edge, middle)
        if probe(prefix, stages, edge=[0.0] * (n + 1), room=tried, bound=inf) is None:
            low = middle
        else:
            high = middle
    return high


def probe(
    prefix: Sequence[float], stages: int, *, edge: Sequence[float], room: Room | None, bound: float
) -> list[int] | None:
    """Cuts with no stage over `bound`, or None. Every stage holds at least one block."""
    n = len(prefix) - 1
    windows = _windows(prefix, stages, room=room, bound=bound)
    if windows is None:
        return None
    reached, parents = [0], []
    for stage in range(stages):
        first, last = windows[stage + 1]
        parent: dict[int, int] = {}
        for b in range(first, last + 1):
            # From the longest start that can still be right, the nearest first: once a stage is too long
            # even without what its own start costs, every earlier start is too long as well.
            for k in range(bisect_left(reached, b) - 1, -1, -1):
                a = reached[k]
                inner = prefix[b] - prefix[a] + edge[b]
                if inner > bound:
                    break
                if room is not None:
                    solid = room.solid(stage, a, b) + room.edge[b]
                    if solid > room.limit:
                        break
                    if solid + room.edge[a] > room.limit:
                        continue
                if inner + edge[a] <= bound:
                    parent[b] = a
                    break
        if not parent:
            return None
        reached = sorted(parent)
        parents.append(parent)
    if reached[-1] != n:
        return None
    cuts = [n]
    for parent in reversed(parents):
        cuts.append(parent[cuts[-1]])
    return cuts[::-1]


def _windows(
    prefix: Sequence[float], stages: int, *, room: Room | None, bound: float
) -> list[tuple[int, int]] | None:
    """For each number of stages, the first and last position where they can end, boundaries taken as free.

    Greedy from the left gives the last, from the right the first. Where not even one block fits, the position
    stays: another cut before it may still do."""
    n = len(prefix) - 1

    def fits(stage: int, a: int, b: int) -> bool:
        return room is None or room.solid(stage, a, b) <= room.limit

    lasts = [0]
    for stage in range(stages):
        a = lasts[-1]
        b = min(bisect_right(prefix, prefix[a] + bound) - 1, n - (stages - 1 - stage))
        if b > a and not fits(stage, a, b):
            b = a + bisect_left(range(a + 1, b + 1), True, key=lambda k: not fits(stage, a, k))
        lasts.append(max(a, b))
    firsts = [n]
    for stage in range(stages - 1, -1, -1):
        b = firsts[-1]
        a = max(bisect_left(prefix, prefix[b] - bound), stage)
        if a < b and not fits(stage, a, b):
            a += bisect_left(range(a, b), True, key=lambda k: fits(stage, k, b))
        firsts.append(min(a, b))
    if lasts[-1] < n or firsts[-1] > 0:
        return None
    return list(zip(reversed(firsts), lasts))


def fold_v(prefix: Sequence[float], ranks: int) -> tuple[float, list[int]]:
    """min over splits into 2 * ranks stages (which may be empty) of max over r of stage r + stage 2p-1-r."""
    n = len(prefix) - 1

    def feasible(bound: float) -> list[int] | None:
        states, trail = {0: n}, []
        for _ in range(ranks):
            after: dict[int, int] = {}
            came: dict[int, tuple[int, int]] = {}
            for i, j in states.items():
                for i2 in range(i, j + 1):
                    rest = bound - (prefix[i2] - prefix[i])
                    if rest < 0:
                        break
                    j2 = max(bisect_left(prefix, prefix[j] - rest), i2)
                    if j2 < after.get(i2, n + 1):
                        after[i2], came[i2] = j2, (i, j)
            states = after
            trail.append(came)
        meet = next((i for i in sorted(states) if states[i] <= i), None)
        if meet is None:
            return None
        left, right = [meet], []
        for came in reversed(trail):
            i, j = came[left[-1]]
            left.append(i)
            right.append(j)
        return left[::-1] + right

    return _least(prefix, ranks, feasible, lambda cuts: rank_load(prefix, cuts, ranks=ranks, placement="v"))


def fold_loop(prefix: Sequence[float], ranks: int) -> tuple[float, list[int]]:
    """min over splits into 2 * ranks stages (which may be empty) of max over r of stage r + stage p+r."""
    n = len(prefix) - 1
    best: tuple[float, list[int]] = prefix[n] - prefix[0], [0] * ranks + [0] + [n] * ranks

    def load(cuts: list[int]) -> float:
        return rank_load(prefix, cuts, ranks=ranks, placement="loop")

    for turn in sorted(range(n + 1), key=lambda k: abs(2 * k - n)):

        def feasible(bound: float, turn: int = turn) -> list[int] | None:
            states, trail = {0: turn}, []
            for _ in range(ranks):
                after: dict[int, int] = {}
                came: dict[int, tuple[int, int]] = {}
                for x, y in states.items():
                    for x2 in range(x, turn + 1):
                        rest = bound - (prefix[x2] - prefix[x])
                        if rest < 0:
                            break
                        y2 = bisect_right(prefix, prefix[y] + rest) - 1
                        if y2 > after.get(x2, -1):
                            after[x2], came[x2] = y2, (x, y)
                states = after
                trail.append(came)
            if states.get(turn, -1) < n:
                return None
            xs, ys = [turn], [n]
            for came in reversed(trail):
                x, y = came[xs[-1]]
                xs.append(x)
                ys.append(y)
            return xs[::-1] + ys[-2::-1]

        if feasible(nextafter(best[0], -inf)):
            found = _least(prefix, ranks, feasible, load)
            best = min(best, found)
    return best


def rank_load(prefix: Sequence[float], cuts: Sequence[int], *, ranks: int, placement: str) -> float:
    """The busiest rank of a split into 2 * ranks stages."""
    size = [prefix[b] - prefix[a] for a, b in itertools.pairwise(cuts)]
    other = reversed(size[ranks:]) if placement == "v" else size[ranks:]
    return max(x + y for x, y in zip(size[:ranks], other))


def _least(
    prefix: Sequence[float], ranks: int, feasible: Callable[[float], list[int] | None],
    load: Callable[[list[int]], float],
) -> tuple[float, list[int]]:
    """Bisection, then strict probes until nothing is better."""
    low, high = (prefix[-1] - prefix[0]) / ranks, prefix[-1] - prefix[0]
    cuts = feasible(high)
    assert cuts is not None, "one rank's load can always be the whole chain"
    high = load(cuts)
    while high - low > RELATIVE_GAP * high:
        middle = (low + high) / 2
        better = feasible(middle)
        if better is None:
            low = middle
        else:
            cuts, high = better, min(middle, load(better))
    while (better := feasible(nextafter(high, -inf))) is not None and load(better) < high:
        cuts, high = better, load(better)
    return load(cuts), cuts
