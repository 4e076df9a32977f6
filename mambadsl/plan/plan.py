"""The planner: units in, `Plan` out.

In: the chain's units, how many stages, a schedule, a device. Out: a frozen `Plan`, plain data in a stable
order: the split with the smallest simulated step time among the legal ones that fit into memory.
Refuses (as `MdlError`): stages that contradict the text's `|` (E801), more stages than places to cut (E802),
what does not fit into memory (E803), a `|` where nothing can be sent (E804), counts that the schedule cannot
run (E810 to E812), an unknown device or a bad file of measured times (E820, E821).

A step here is all forwards and backwards of one batch: no optimizer update, no gradient reduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambadsl.plan import device as devices
from mambadsl.plan.chain import PICOSECONDS, Chain
from mambadsl.plan.device import Device
from mambadsl.plan.explain import (
    MICROBATCHES_PER_RANK,
    Alternative,
    difference,
    stages_text,
    too_large,
    why_slowest,
)
from mambadsl.plan.pricing import Pricing
from mambadsl.plan.schedule import SCHEDULES, Action, orders, problems
from mambadsl.plan.search import Found, search
from mambadsl.plan.simulate import Timeline, program, timeline
from mambadsl.plan.unit import Unit
from mambadsl.text.diagnostic import Diagnostic, Label, MdlError, declare

E801 = declare(
    "E801",
    "the text's cuts and the number of stages disagree",
    """
    `|` in the stack cuts the pipeline there: n marks make n + 1 stages. A number of stages asked for as well
    must be that number (ranks times stages a rank). Take out the marks to let the planner choose the cuts,
    or leave out the number.
    """,
)
E802 = declare(
    "E802",
    "more stages than the model can be cut into",
    """
    Every stage holds at least one layer (or the embedding, or the head), and some places cannot be cut: a
    tensor crosses there that cannot be sent. The message gives the largest number of stages.
    """,
)
E804 = declare(
    "E804",
    "`|` stands where the model cannot be cut",
    """
    A tensor crosses here that cannot be sent to another stage, or nothing is left on one side. Move the `|`
    to one of the places that the message names.
    """,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: units `first` to `last` (exclusive) of the chain, on `rank`.

    Times are seconds for one microbatch; share: the part of the step in which the rank works on this stage.
    in_flight: the most microbatches it keeps at once. static_bytes: weights, gradients, optimizer state.
    activation_bytes: kept for each microbatch in flight. send_bytes: crosses to the next stage, for each.
    """

    index: int
    rank: int
    first: int
    last: int
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    params: int
    forward_s: float
    backward_s: float
    share: float
    in_flight: int
    static_bytes: int
    activation_bytes: int
    buffer_bytes: int
    send_bytes: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What the actions of one kind of a stage take, and the rank waits before each: seconds, on the mean of a step."""

    stage: int
    kind: str
    seconds: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Which unit runs where and when, and what it costs.

    cuts: unit indices, stage s holds cuts[s] to cuts[s + 1]. ranks, virtual: len(stages) == ranks * virtual.
    step_s: predicted time of one batch of `microbatches`. bubble: part of all ranks' time without work;
    idle: of each rank. peak_bytes: of each rank. slowest: index of the stage; why: a sentence.
    replicas: (owner of shared weights, stages that hold them), where it is more than one stage.
    next_best: the best other split found; own_cuts: what the planner would cut where the text's `|` decide.
    microbatches_given, cuts_given: False where the planner chose. spent: by stage and kind of action.
    """

    device: str
    schedule: str
    placement: str
    ranks: int
    virtual: int
    microbatches: int
    microbatches_given: bool
    cuts: tuple[int, ...]
    cuts_given: bool
    stages: tuple[Stage, ...]
    step_s: float
    bubble: float
    idle: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    memory_limit: int
    slowest: int
    why: str
    replicas: tuple[tuple[str, tuple[int, ...]], ...] = ()
    next_best: Alternative | None = None
    own_cuts: Alternative | None = None
    simulated: int = 0
    spent: tuple[Spent, ...] = ()

    def __post_init__(self) -> None:
        """Nothing is dropped: every unit in one stage, in order, and no stage empty."""
        ends = [stage.last for stage in self.stages]
        assert [stage.first for stage in self.stages] == [0, *ends[:-1]] == list(self.cuts[:-1])
        assert all(len(s.paths) == s.last - s.first > 0 for s in self.stages)
        assert len(self.stages) == self.ranks * self.virtual

    def stage_of(self, path: str) -> int:
        """The stage that holds a unit. ValueError if there is no such unit."""
        for stage in self.stages:
            if path in stage.paths:
                return stage.index
        raise ValueError(f"no stage has a unit `{path}`; `paths` of `stages` lists them")

    def orders(self) -> tuple[tuple[Action, ...], ...]:
        """What each rank runs, in order."""
        return orders(self.schedule, ranks=self.ranks, virtual=self.virtual, microbatches=self.microbatches)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data (dicts, lists, numbers, text)."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """What `to_json` gave. KeyError, TypeError or AssertionError if it is something else."""
        own = {key: _frozen(value) for key, value in data.items()}
        own["stages"] = tuple(Stage(**{k: _frozen(v) for k, v in stage.items()}) for stage in data["stages"])
        own["spent"] = tuple(Spent(**row) for row in data["spent"])
        for key in ("next_best", "own_cuts"):
            if data[key] is not None:
                own[key] = Alternative(**{k: _frozen(v) for k, v in data[key].items()})
        return Plan(**own)


def plan_units(
    units: Sequence[Unit],
    *,
    stages: int | None = None,
    schedule: str = "1f1b",
    microbatches: int | None = None,
    virtual: int | None = None,
    memory_limit: int | None = None,
    device: str | Path | Device = "h200",
    microbatch_tokens: int | None = None,
) -> Plan:
    """Cuts the chain for a pipeline.

    stages: ranks of the pipeline (each runs `virtual` stages); None: as many as the `|` marks make, else 1.
    schedule: one of `SCHEDULES`. microbatches: default 4 for each rank. virtual: stages a rank, default the
    schedule's least. memory_limit: bytes a rank, default what the device leaves. microbatch_tokens: checked
    against a file of measured times.
    """
    where = devices.device(device)
    units = devices.measured(units, where, microbatch_tokens=microbatch_tokens)
    marks = [k for k, unit in enumerate(units, 1) if unit.cut_after]
    if schedule not in SCHEDULES:
        raise MdlError(problems(schedule, ranks=1, virtual=1, microbatches=1))
    each = SCHEDULES[schedule].default_virtual if virtual is None else virtual
    ranks = _ranks(units, marks, stages=stages, virtual=each)
    count = MICROBATCHES_PER_RANK * ranks if microbatches is None else microbatches
    if found := problems(schedule, ranks=ranks, virtual=each, microbatches=count):
        raise MdlError(found)
    limit = where.memory_limit if memory_limit is None else memory_limit

    def pricing(only: list[int] | None) -> Pricing:
        chain = Chain(units, device=where, only=only)
        if chain.blocks < ranks * each:
            raise MdlError([_too_many(chain.blocks, ranks=ranks, virtual=each)])
        run = program(schedule, ranks=ranks, virtual=each, microbatches=count)
        return Pricing(run, chain, device=where, microbatches=count, limit=limit)

    free = pricing(None)
    used = pricing(marks) if marks else free
    best = search(used)
    if best is None:
        raise MdlError([
            too_large(used, schedule=schedule, device=where, microbatches=microbatches, free=free)
        ])
    own = search(free) if marks else None
    return _plan(
        used, best, where, schedule=schedule, given=microbatches is not None, marks=marks,
        own=own and _alternative(free, used.chain.unit_cuts(best.cuts), best.step, own.cuts, own.step),
    )


def _ranks(units: Sequence[Unit], marks: list[int], *, stages: int | None, virtual: int) -> int:
    """The number of ranks, from the request and the marks. E801, E802, E804."""
    found = []
    for k in marks:
        unit = units[k - 1]
        if k == len(units) or not unit.can_cut_after:
            near = [units[n - 1].path for n in range(1, len(units)) if units[n - 1].can_cut_after]
            near = sorted(near, key=lambda path: abs(_index(units, path) - k))[:2]
            message = f"the model cannot be cut after `{unit.path}`"
            help = (f"it can after {' and '.join(f'`{path}`' for path in near)}",) if near else ()
            found.append(Diagnostic(E804, message, unit.span, help=help))
    if stages is not None and stages < 1:
        found.append(Diagnostic(E802, f"a pipeline has at least one stage, not {stages}"))
    asked = len(marks) + 1 if stages is None else stages * virtual
    if marks and (len(marks) + 1 != asked or asked % virtual):
        total = len(marks) + 1
        first = next((units[k - 1].span for k in marks if units[k - 1].span), None)
        labels = tuple(
            Label(span, "and here") for k in marks if (span := units[k - 1].span) and span is not first
        )
        ranks = "" if stages is None else f", not {stages}" if virtual == 1 else f", not {stages} x {virtual}"
        makes = "cuts `|` make" if len(marks) > 1 else "cut `|` makes"
        message = f"the text's {len(marks)} {makes} {total} stages{ranks}"
        if total % virtual:
            message += f"; {total} cannot be shared by ranks with {virtual} stages each"
        help = (f"ask for {stages_text(total // virtual, virtual)}, or take the `|` out",)
        if total % virtual:
            help = ("take the `|` out to let the planner cut",)
        found.append(Diagnostic(E801, message, first, "a cut here" if first else "", labels[:4], help=help))
    if found:
        raise MdlError(found)
    return stages if stages is not None else max(1, (len(marks) + 1) // virtual)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _index(units: Sequence[Unit], path: str) -> int:
    return next(k for k, unit in enumerate(units, 1) if unit.path == path)


def _too_many(blocks: int, *, ranks: int, virtual: int) -> Diagnostic:
    most = blocks // virtual
    wanted, possible = stages_text(ranks, virtual), stages_text(most, virtual)
    message = f"the model can be cut into {stages_text(blocks, 1)} at most: {wanted} are too many"
    return Diagnostic(E802, message, help=(f"at most {possible}",) if most else ())


def _alternative(
    pricing: Pricing, cuts: tuple[int, ...], step: float, other: Sequence[int], other_step: float
) -> Alternative:
    others = pricing.chain.unit_cuts(other)
    return Alternative(
        cuts=others, step_s=other_step / PICOSECONDS, worse_by=other_step / step - 1,
        text=difference(pricing.chain.units, cuts, others), peak_bytes=max(pricing.peaks(other)),
    )


def _plan(
    pricing: Pricing, best: Found, device: Device, *, schedule: str, given: bool, marks: list[int],
    own: Alternative | None,
) -> Plan:
    chain, run, cuts = pricing.chain, pricing.program, pricing.chain.unit_cuts(best.cuts)
    vector = pricing.durations(best.cuts)
    times = timeline(run, vector, beside=pricing.beside)
    assert times.step == best.step
    stages = tuple(_stage(pricing, best.cuts, s, step=best.step) for s in range(run.stages))
    slowest = max(stages, key=lambda stage: (stage.forward_s + stage.backward_s, -stage.index))
    owners: dict[str, list[int]] = {}
    for stage in stages:
        here = (u.owner for u in chain.units[stage.first : stage.last] if u.owner is not None)
        for name in dict.fromkeys(here):
            owners.setdefault(name, []).append(stage.index)
    return Plan(
        device=device.name,
        schedule=schedule,
        placement=SCHEDULES[schedule].placement,
        ranks=len(run.lasts),
        virtual=run.stages // len(run.lasts),
        microbatches=pricing.microbatches,
        microbatches_given=given,
        cuts=cuts,
        cuts_given=bool(marks),
        stages=stages,
        step_s=best.step / PICOSECONDS,
        bubble=times.bubble,
        idle=tuple(1 - busy / times.step if times.step else 0.0 for busy in times.busy),
        peak_bytes=tuple(pricing.peaks(best.cuts)),
        memory_limit=int(pricing.limit),
        slowest=slowest.index,
        why=why_slowest(pricing, best.cuts, slowest.index, marked=bool(marks)),
        replicas=tuple((name, tuple(held)) for name, held in owners.items() if len(held) > 1),
        next_best=None if best.next_cuts is None or best.next_step is None
        else _alternative(pricing, cuts, best.step, best.next_cuts, best.next_step),
        own_cuts=own,
        simulated=best.simulated,
        spent=tuple(_spent(times)),
    )


def _spent(times: Timeline) -> Iterator[Spent]:
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for spans in times.spans:
        before = 0.0
        for start, end, (kind, stage, _) in spans:
            found.setdefault((stage, kind), []).append((end - start, start - before))
            before = end
    for (stage, kind), each in sorted(found.items()):
        yield Spent(stage, kind, *(sum(n) / len(each) / PICOSECONDS for n in zip(*each)))


def _stage(pricing: Pricing, cuts: Sequence[int], stage: int, *, step: float) -> Stage:
    chain, run = pricing.chain, pricing.program
    a, b = cuts[stage], cuts[stage + 1]
    part = chain.segment(a, b)
    first, last = chain.positions[a], chain.positions[b]
    units = chain.units[first:last]
    rank = run.rank_of_stage[stage]
    place = run.local_stages[rank].index(stage)
    shared = {unit.owner: unit.shared_params for unit in units if unit.owner is not None}
    busy = part.forward + part.backward_input + part.backward_weight
    return Stage(
        index=stage,
        rank=rank,
        first=first,
        last=last,
        paths=tuple(unit.path for unit in units),
        labels=tuple(unit.label or unit.kind for unit in units),
        params=sum(unit.params for unit in units) + sum(shared.values()),
        forward_s=part.forward / PICOSECONDS,
        backward_s=(part.backward_input + part.backward_weight) / PICOSECONDS,
        share=pricing.microbatches * busy / step if step else 0.0,
        in_flight=max(counts[place] for counts in run.live[rank]),
        static_bytes=part.static_bytes,
        activation_bytes=part.activation_bytes,
        buffer_bytes=pricing.buffer_bytes(cuts, stage),
        send_bytes=chain.cut_bytes[b],
    )
