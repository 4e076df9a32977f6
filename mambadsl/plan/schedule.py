"""Pipeline schedules: in which order each rank runs its forwards and backwards.

In: a schedule's name, ranks, virtual stages a rank, microbatches. Out: for each rank a list of `Action`s, and
the map from stage to rank. Refuses counts that a schedule cannot run, with the nearest that it can.

All loop schedules are one rule with three numbers: how many forwards a rank runs before its first backward,
in rounds of how many microbatches it walks its stages, and by how many microbatches weight gradients lag.
GPipe: Huang et al. 2019. 1F1B and interleaved: Narayanan et al. 2021 (Megatron-LM). Zero bubble (ZB-H1) and
ZB-V: Qi et al. 2023 and 2024. Counts accepted are those of torch.distributed.pipelining.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import NamedTuple

from mambadsl.text.diagnostic import Diagnostic, MdlError, declare

E810 = declare(
    "E810",
    "there is no such schedule",
    """
    `gpipe` runs all forwards, then all backwards. `1f1b` alternates them and keeps fewer microbatches in
    memory. `interleaved` gives each rank several stages, which shrinks the bubble and sends more. `zb` and
    `zbv` split the backward pass into input and weight gradients and fill the bubble with the latter; `zbv`
    places two stages on each rank in a V, so that the first rank also has the last stage.
    """,
)
E811 = declare(
    "E811",
    "the schedule cannot run this number of microbatches",
    """
    `1f1b` needs at least as many microbatches as stages. `interleaved` and `zb` walk their stages in
    `max(1, microbatches // ranks)` equal rounds, so the number of microbatches must divide into that many.
    `gpipe` and `zbv` take any number.
    """,
)
E812 = declare(
    "E812",
    "the schedule cannot run this number of stages a rank",
    """
    `1f1b` has one stage a rank, `interleaved` two or more, `zbv` exactly two, `gpipe` and `zb` any number.
    """,
)

FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = "F", "B", "I", "W"
KINDS = (FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)


class Action(NamedTuple):
    """One microbatch through one stage: F forward, B whole backward, I and W its halves: gradients of inputs,
    of weights."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """virtual: legal stages a rank, None for any; `order(ranks, virtual, microbatches, rank)` -> actions."""

    name: str
    placement: str
    kinds: tuple[str, ...]
    virtual: tuple[int, int | None]
    accepts: Callable[[int, int], bool]
    order: Callable[[int, int, int, int], list[Action]]

    @property
    def default_virtual(self) -> int:
        return self.virtual[0]


def rank_of(placement: str, ranks: int, stage: int) -> int:
    """loop: stage s on rank s % ranks. v: back and forth, so rank r has r and 2 * ranks - 1 - r."""
    turn, place = divmod(stage, ranks)
    return ranks - 1 - place if placement == "v" and turn % 2 else place


@lru_cache(maxsize=32)
def orders(name: str, *, ranks: int, virtual: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """What each rank runs, in order. Refuses what `problems` reports, all at once."""
    found = problems(name, ranks=ranks, virtual=virtual, microbatches=microbatches)
    if found:
        raise MdlError(found)
    order = SCHEDULES[name].order
    return tuple(tuple(order(ranks, virtual, microbatches, rank)) for rank in range(ranks))


def problems(name: str, *, ranks: int, virtual: int, microbatches: int) -> list[Diagnostic]:
    """Why these counts cannot run: E810, E811, E812; empty if they can."""
    if name not in SCHEDULES:
        known = f"schedules: {', '.join(SCHEDULES)}"
        return [Diagnostic(E810, f"there is no schedule `{name}`", help=(known,))]
    schedule, found = SCHEDULES[name], []
    low, high = schedule.virtual
    if virtual < low or (high is not None and virtual > high):
        wanted = f"exactly {low}" if low == high else f"at least {low}"
        message = f"`{name}` has {wanted} stage{'s' * (low > 1)} a rank, not {virtual}"
        found.append(Diagnostic(E812, message, help=_others(virtual, not_=name)))
    if microbatches < 1 or not schedule.accepts(ranks, microbatches):
        where, what = f"{ranks} rank{'s' * (ranks != 1)}", f"microbatch{'es' * (microbatches != 1)}"
        message = f"`{name}` on {where} cannot run {microbatches} {what}"
        near = nearest_microbatches(name, ranks=ranks, microbatches=microbatches)
        help = f"the nearest it can run: {', '.join(map(str, near))}"
        found.append(Diagnostic(E811, message, help=(help,)))
    return found


def nearest_microbatches(name: str, *, ranks: int, microbatches: int) -> list[int]:
    """The nearest legal number below, if there is one, and above."""
    accepts = SCHEDULES[name].accepts
    below = next((m for m in range(microbatches - 1, 0, -1) if accepts(ranks, m)), None)
    above = next(m for m in count(max(1, microbatches + 1)) if accepts(ranks, m))
    return [m for m in (below, above) if m is not None]


def _others(virtual: int, *, not_: str) -> tuple[str, ...]:
    fit = [s.name for s in SCHEDULES.values() if s.virtual[0] <= virtual <= (s.virtual[1] or virtual)]
    fit = [name for name in fit if name != not_]
    return (f"with {virtual} stage{'s' * (virtual > 1)} a rank: {', '.join(fit)}",) if fit else ()


def _in_rounds(ranks: int, microbatches: int) -> bool:
    return microbatches % max(1, microbatches // ranks) == 0


def _round(ranks: int, microbatches: int) -> int:
    """Microbatches that a rank takes through one of its stages before it turns to the next."""
    return microbatches // max(1, microbatches // ranks)


def _loop(
    ranks: int, virtual: int, microbatches: int, rank: int, *, warmup: int, round_size: int, lag: int | None
) -> list[Action]:
    """`warmup` forwards, then forward and backward in turn, then the backwards left. With a lag (not None),
    backwards compute input gradients only, and weight gradients follow once more than `lag` of them wait."""
    total = virtual * microbatches

    def step(k: int) -> tuple[int, int]:
        turn, place = divmod(k, round_size)
        return turn % virtual, turn // virtual * round_size + place

    forwards = [Action(FORWARD, turn * ranks + rank, mb) for turn, mb in map(step, range(total))]
    kind = BACKWARD if lag is None else BACKWARD_INPUT
    out, waiting = forwards[:warmup], deque()
    for k, (turn, mb) in enumerate(map(step, range(total))):
        if warmup + k < total:
            out.append(forwards[warmup + k])
        stage = (virtual - 1 - turn) * ranks + rank
        out.append(Action(kind, stage, mb))
        if lag is not None:
            waiting.append(Action(BACKWARD_WEIGHT, stage, mb))
            if len(waiting) > lag:
                out.append(waiting.popleft())
    return out + list(waiting)


def _gpipe(ranks: int, virtual: int, microbatches: int, rank: int) -> list[Action]:
    return _loop(
        ranks, virtual, microbatches, rank, warmup=virtual * microbatches, round_size=microbatches, lag=None
    )


def _one_f_one_b(ranks: int, virtual: int, microbatches: int, rank: int) -> list[Action]:
    warmup = ranks - 1 - rank
    return _loop(ranks, virtual, microbatches, rank, warmup=warmup, round_size=microbatches, lag=None)


def _interleaved(ranks: int, virtual: int, microbatches: int, rank: int) -> list[Action]:
    size = _round(ranks, microbatches)
    warmup = min((virtual - 1) * size + 2 * (ranks - 1 - rank), virtual * microbatches)
    return _loop(ranks, virtual, microbatches, rank, warmup=warmup, round_size=size, lag=None)


def _zero_bubble(ranks: int, virtual: int, microbatches: int, rank: int) -> list[Action]:
    """A backward that only makes input gradients returns sooner: half of `interleaved`'s warm-up will do."""
    size = _round(ranks, microbatches)
    warmup = min((virtual - 1) * size + ranks - 1 - rank, virtual * microbatches)
    return _loop(ranks, virtual, microbatches, rank, warmup=warmup, round_size=size, lag=rank)


def _zero_bubble_v(ranks: int, virtual: int, microbatches: int, rank: int) -> list[Action]:
    """Down the V with the first stage, up with the second. A pipeline of fewer than 2 * ranks - 1
    microbatches is a longer one with the rest left out: nothing waits for what is missing."""
    enough = max(microbatches, 2 * ranks - 1)
    down, up = rank, 2 * ranks - 1 - rank
    done: dict[tuple[str, int], int] = {}
    out: list[Action] = []

    def run(*steps: tuple[str, int]) -> None:
        for kind, stage in steps:
            mb = done.get((kind, stage), 0)
            done[kind, stage] = mb + 1
            out.append(Action(kind, stage, mb))

    def left(kind: str, stage: int) -> int:
        return enough - done.get((kind, stage), 0)

    F, I, W = FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT
    for _ in range(2 * (ranks - rank) - 1):
        run((F, down))
    for _ in range(rank):
        run((F, up), (F, down))
    for _ in range(ranks - rank):
        run((F, up), (I, up), (W, up))
    while left(F, up):
        if left(F, down):
            run((F, down))
        run((I, down), (W, down), (F, up), (I, up), (W, up))
    for _ in range(rank):
        run((I, down), (I, up))
    while left(I, down):
        run((I, down), (W, down))
    while left(W, up):
        run((W, up))
    while left(W, down):
        run((W, down))
    return [action for action in out if action.microbatch < microbatches]


_WHOLE, _SPLIT = (FORWARD, BACKWARD), (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)

SCHEDULES: dict[str, Schedule] = {
    s.name: s
    for s in (
        Schedule("gpipe", "loop", _WHOLE, (1, None), lambda p, m: m >= 1, _gpipe),
        Schedule("1f1b", "loop", _WHOLE, (1, 1), lambda p, m: m >= p, _one_f_one_b),
        Schedule("interleaved", "loop", _WHOLE, (2, None), _in_rounds, _interleaved),
        Schedule("zb", "loop", _SPLIT, (1, None), _in_rounds, _zero_bubble),
        Schedule("zbv", "v", _SPLIT, (2, 2), lambda p, m: m >= 1, _zero_bubble_v),
    )
}
