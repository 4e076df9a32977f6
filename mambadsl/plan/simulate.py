"""The event simulator: when does each action of a schedule run, and how long does a step take?

In: the ranks' ordered actions and a vector of durations (one slot for each kind and stage, one for the
transfer over each boundary). Out: the step time, the critical path as a plane, a timeline.

An action starts when its rank is free and its input has come. Sends never block the sender. Because every
rank's order is fixed, the schedule is a fixed graph, and the step time is its longest path. The graph is
built once (`compile_orders`); one step is then one pass over a flat list. A longest path is a linear
function of the durations that no other durations can undercut (the step time is the maximum over all
paths), which is what lets the search discard most candidates without simulating them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mambadsl.plan.schedule import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    KINDS,
    SCHEDULES,
    Action,
    orders,
    rank_of,
)


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A schedule as a graph.

    ops[k] = (op before on the rank, op whose output it needs, transfer slot, duration slot), ops counted from
    1 in an order in which nothing comes before what it needs; op 0 is the start of the step.
    ranks[k], actions[k]: of op k + 1. lasts: the last op of each rank. local_stages: of each rank.
    live: of each rank, microbatches kept at once for each local stage, the maximal combinations only.
    """

    stages: int
    rank_of_stage: tuple[int, ...]
    kinds: tuple[str, ...]
    ops: tuple[tuple[int, int, int, int], ...]
    actions: tuple[Action, ...]
    lasts: tuple[int, ...]
    local_stages: tuple[tuple[int, ...], ...]
    live: tuple[tuple[tuple[int, ...], ...], ...]

    def slot(self, kind: str, stage: int) -> int:
        return self.kinds.index(kind) * self.stages + stage

    def transfer_slot(self, boundary: int) -> int:
        """Of the boundary between stages `boundary` and `boundary + 1`."""
        return len(self.kinds) * self.stages + boundary

    @property
    def slots(self) -> int:
        """Length of a duration vector. The last slot is always 0.0: no transfer."""
        return (len(self.kinds) + 1) * self.stages

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The most microbatches that each rank keeps, summed over its stages."""
        return tuple(max(sum(counts) for counts in live) for live in self.live)


@lru_cache(maxsize=32)
def program(name: str, *, ranks: int, virtual: int, microbatches: int) -> Program:
    """The graph of a named schedule."""
    placement = SCHEDULES[name].placement
    acts = orders(name, ranks=ranks, virtual=virtual, microbatches=microbatches)
    places = tuple(rank_of(placement, ranks, s) for s in range(ranks * virtual))
    return compile_orders(acts, rank_of_stage=places)


def compile_orders(acts: tuple[tuple[Action, ...], ...], *, rank_of_stage: tuple[int, ...]) -> Program:
    """The graph of any orders. Refuses (`ValueError`) orders that wait for each other for ever."""
    stages = len(rank_of_stage)
    kinds = tuple(k for k in KINDS if any(a.kind == k for rank in acts for a in rank))
    base = {kind: n * stages for n, kind in enumerate(kinds)}
    transfers, none = len(kinds) * stages, (len(kinds) + 1) * stages - 1
    ends: dict[tuple[str, int, int], int] = {}
    ops: list[tuple[int, int, int, int]] = []
    actions: list[Action] = []
    at, last = [0] * len(acts), [0] * len(acts)
    left, before = sum(map(len, acts)), -1
    while left:
        if left == before:
            waiting = ", ".join(str(rank[k]) for rank, k in zip(acts, at) if k < len(rank))
            raise ValueError(f"the orders wait for each other: {waiting}")
        before = left
        for rank, order in enumerate(acts):
            while at[rank] < len(order):
                action = order[at[rank]]
                kind, stage, mb = action
                if kind == FORWARD:
                    key, lane = (FORWARD, stage - 1, mb) if stage else None, stage - 1
                elif kind == BACKWARD_WEIGHT:
                    key, lane = (BACKWARD_INPUT, stage, mb), None
                elif stage == stages - 1:
                    key, lane = (FORWARD, stage, mb), None
                else:
                    key, lane = (BACKWARD_INPUT, stage + 1, mb), stage
                need = ends.get(key) if key else 0
                if need is None:
                    break
                ops.append((last[rank], need, none if not key or lane is None else transfers + lane,
                            base[kind] + stage))
                actions.append(action)
                last[rank] = len(ops)
                ends[BACKWARD_INPUT if kind not in (FORWARD, BACKWARD_WEIGHT) else kind, stage, mb] = len(ops)
                at[rank] += 1
                left -= 1
    local = tuple(tuple(s for s in range(stages) if rank_of_stage[s] == r) for r in range(len(acts)))
    live = tuple(_live(order, here) for order, here in zip(acts, local))
    return Program(stages, rank_of_stage, kinds, tuple(ops), tuple(actions), tuple(last), local, live)


def _live(order: tuple[Action, ...], stages: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Microbatches kept for each local stage (from F to B or W), at the moments that no other dominates."""
    place, now, seen = {s: n for n, s in enumerate(stages)}, [0] * len(stages), set()
    for kind, stage, _ in order:
        if kind == FORWARD:
            now[place[stage]] += 1
            seen.add(tuple(now))
        elif kind != BACKWARD_INPUT:
            now[place[stage]] -= 1
    maximal: list[tuple[int, ...]] = []
    for counts in sorted(seen, key=lambda c: (-sum(c), c)):
        if not any(all(x >= y for x, y in zip(kept, counts)) for kept in maximal):
            maximal.append(counts)
    return tuple(maximal)


def step_time(program: Program, durations: list[float]) -> float:
    """The step's time, in the unit of the durations. The one hot loop of the planner."""
    ends = _ends(program.ops, durations)
    return max([ends[k] for k in program.lasts])


def step_plane(program: Program, durations: list[float]) -> tuple[float, list[int]]:
    """The step's time and how often each slot lies on one longest path: time == sum(count * duration)."""
    ops, ends = program.ops, _ends(program.ops, durations)
    k = max(program.lasts, key=ends.__getitem__)
    time, counts = ends[k], [0] * program.slots
    while k:
        before, need, lane, slot = ops[k - 1]
        counts[slot] += 1
        if ends[need] + durations[lane] > ends[before]:
            counts[lane] += 1
            k = need
        else:
            k = before
    return time, counts


def _ends(ops: tuple[tuple[int, int, int, int], ...], durations: list[float]) -> list[float]:
    ends = [0.0]
    push = ends.append
    for before, need, lane, slot in ops:
        free, come = ends[before], ends[need] + durations[lane]
        push((free if free > come else come) + durations[slot])
    return ends


@dataclass(frozen=True, slots=True)
class Timeline:
    """spans: of each rank, (start, end, action) in order. busy: of each rank, time in which it computes."""

    step: float
    spans: tuple[tuple[tuple[float, float, Action], ...], ...]
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which nothing runs."""
        return 1 - sum(self.busy) / (self.step * len(self.busy)) if self.step else 0.0


def timeline(program: Program, durations: list[float]) -> Timeline:
    """When every action runs."""
    ends = _ends(program.ops, durations)
    spans: list[list[tuple[float, float, Action]]] = [[] for _ in program.lasts]
    for k, (action, op) in enumerate(zip(program.actions, program.ops), 1):
        spans[program.rank_of_stage[action.stage]].append((ends[k] - durations[op[3]], ends[k], action))
    busy = tuple(sum(end - start for start, end, _ in rank) for rank in spans)
    return Timeline(max(ends[k] for k in program.lasts), tuple(map(tuple, spans)), busy)
