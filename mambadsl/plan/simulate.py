"""The event simulator: when does each action of a schedule run, and how long does a step take?

In: the ranks' ordered actions and a vector of durations (one slot for each kind and stage, one for the
transfer over each boundary). Out: the step time, the critical path as a plane, a timeline.

An action starts when its rank is free and its input has come. What goes to another rank is a transfer, as
torch.distributed.pipelining makes it and NCCL runs it:

- The sender issues it right after the action that made it, the receiver as early as both orders allow
  (`_add_send_recv`). Nobody waits for what it sends.
- Each side begins when what its rank was given before is done (NCCL's stream waits for the layers'), and a transfer
  needs both sides.
- Two ranks have one stream for both directions: transfers run one after another, in the order in which they were
  issued, and one that waits holds up those behind it.

While a side waits or sends, its kernel keeps a part of the device from the layers: `timeline` makes them longer by
that, planes do not.

Because every rank's order is fixed, the schedule is a fixed graph, and the step time is its longest path. The graph is
built once (`compile_orders`); one step is then one pass over a flat list. A longest path is a linear
function of the durations that no other durations can undercut (the step time is the maximum over all
paths), which is what lets the search discard most candidates without simulating them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mambadsl.plan.schedule import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    KINDS,
    SCHEDULES,
    Action,
    orders,
    rank_of,
)

#: Transfers of what a stage made: to the stage after it, to the one before.
ACTIVATION, GRADIENT = "->", "<-"


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A schedule as a graph.

    ops[k] = (op, op, op, duration slot): it starts when the three are done. Of an action they are the one before on the
    rank and, twice, its input; of a transfer, what sender and receiver did before, and the transfer before it
    between the two. Ops are counted from 1 in an order in which nothing comes before what it needs; op 0 is the start
    of the step. actions[k], ranks[k]: of op k + 1, the action and its rank; or the transfer, its sender and receiver.
    lasts: the last op of each rank. local_stages: of each rank.
    live: of each rank, microbatches kept at once for each local stage, the maximal combinations only.
    """

    stages: int
    rank_of_stage: tuple[int, ...]
    kinds: tuple[str, ...]
    ops: tuple[tuple[int, int, int, int], ...]
    actions: tuple[Action, ...]
    ranks: tuple[tuple[int, ...], ...]
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
        """Length of a duration vector. The last slot is of no boundary."""
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
    base = {kind: n * stages for n, kind in enumerate((*kinds, ACTIVATION))}
    ops: list[tuple[tuple[int, int, int, int], Action, tuple[int, ...]]] = []
    # Of an action, the op that ends it, and the one with which the next stage has what it made.
    done: dict[tuple[str, int, int], int] = {}
    handed: dict[tuple[str, int, int], int] = {}
    between: dict[tuple[int, ...], int] = {}
    at, last = [0] * len(acts), [0] * len(acts)
    left, before = sum(map(len, acts)), -1
    while left:
        if left == before:
            waiting = ", ".join(str(rank[k]) for rank, k in zip(acts, at) if k < len(rank))
            raise ValueError(f"the orders wait for each other: {waiting}")
        before = left
        # One action of each rank in turn, as torch goes through them: that is where receivers issue their side.
        for rank, order in enumerate(acts):
            if at[rank] == len(order):
                continue
            kind, stage, mb = action = order[at[rank]]
            source = _source(action, stages)
            need = (done if source[1] == stage else handed).get(source) if source else 0
            if need is None:
                continue
            ops.append(((last[rank], need, need, base[kind] + stage), action, (rank,)))
            at[rank] += 1
            left -= 1
            made = BACKWARD_INPUT if kind == BACKWARD else kind, stage, mb
            done[made] = handed[made] = last[rank] = len(ops)
            target = stage + 1 if kind == FORWARD else stage - 1
            if kind == BACKWARD_WEIGHT or not 0 <= target < stages or (to := rank_of_stage[target]) == rank:
                continue
            pair, sent = (min(rank, to), max(rank, to)), ACTIVATION if kind == FORWARD else GRADIENT
            op = last[rank], last[to], between.get(pair, 0), base[ACTIVATION] + min(stage, target)
            ops.append((op, Action(sent, stage, mb), (rank, to)))
            handed[made] = between[pair] = len(ops)
    local = tuple(tuple(s for s in range(stages) if rank_of_stage[s] == r) for r in range(len(acts)))
    live = tuple(_live(order, here) for order, here in zip(acts, local))
    flat, actions, ranks = zip(*ops) if ops else ((), (), ())
    return Program(stages, rank_of_stage, kinds, flat, actions, ranks, tuple(last), local, live)


def _source(action: Action, stages: int) -> tuple[str, int, int] | None:
    """The action whose output an action needs; whole backwards by their first half."""
    kind, stage, mb = action
    if kind == FORWARD:
        return (FORWARD, stage - 1, mb) if stage else None
    if kind == BACKWARD_WEIGHT:
        return BACKWARD_INPUT, stage, mb
    return (FORWARD, stage, mb) if stage == stages - 1 else (BACKWARD_INPUT, stage + 1, mb)


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


def step_plane(program: Program, durations: list[float]) -> tuple[float, list[int]]:
    """The step's time, in the unit of the durations, and how often each slot lies on one longest path: time ==
    sum(count * duration)."""
    ops, ends = program.ops, _ends(program.ops, durations)
    k = max(program.lasts, key=ends.__getitem__)
    time, counts = ends[k], [0] * program.slots
    while k:
        *needs, slot = ops[k - 1]
        counts[slot] += 1
        k = max(needs, key=ends.__getitem__)
    return time, counts


def _ends(ops: tuple[tuple[int, int, int, int], ...], durations: list[float]) -> list[float]:
    """When each op ends. The one hot loop of the planner."""
    ends = [0.0]
    push = ends.append
    for a, b, c, slot in ops:
        start, other, third = ends[a], ends[b], ends[c]
        if other > start:
            start = other
        push((third if third > start else start) + durations[slot])
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


def timeline(program: Program, durations: list[float], *, beside: float = 1.0) -> Timeline:
    """When every action runs. beside: how many times longer it takes while its rank has a transfer."""
    ends = [0.0]
    spans: list[list[tuple[float, float, Action]]] = [[] for _ in program.lasts]
    held: list[list[tuple[float, float]]] = [[] for _ in program.lasts]
    for (a, b, c, slot), action, where in zip(program.ops, program.actions, program.ranks):
        start = max(ends[a], ends[b], ends[c])
        if len(where) == 2:
            ends.append(start + durations[slot])
            for rank, own in zip(where, (a, b)):
                held[rank].append((max(ends[own], ends[c]), ends[-1]))
            continue
        [rank] = where
        held[rank] = [span for span in held[rank] if span[1] > start]
        ends.append(_stretched(start, durations[slot], held[rank], beside))
        spans[rank].append((start, ends[-1], action))
    busy = tuple(sum(end - start for start, end, _ in rank) for rank in spans)
    return Timeline(max(ends[k] for k in program.lasts), tuple(map(tuple, spans)), busy)


def _stretched(start: float, work: float, held: list[tuple[float, float]], beside: float) -> float:
    """The end of so much work that takes `beside` times as long in the spans."""
    now = start
    for begin, end in sorted(held):
        begin, end = max(begin, now), max(end, now)
        if work <= begin - now:
            break
        work, now = work - (begin - now), begin
        if work * beside <= end - now:
            return now + work * beside
        work, now = work - (end - now) / beside, end
    return now + work
