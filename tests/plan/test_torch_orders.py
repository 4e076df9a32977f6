"""The schedules of torch.distributed.pipelining as the truth from outside: the same actions, the same
microbatches in flight, no slower on unequal stages, and transfers where torch has them."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest
from chains import step_time

from mambadsl.plan.schedule import Action, orders, problems, rank_of
from mambadsl.plan.simulate import compile_orders, program

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torch_program(name, placement, p, v, m):
    listed = visualizer.get_schedule_ops(name, p, m, num_stages_per_rank=v)
    acts = tuple(
        tuple(
            Action(LETTERS[a.computation_type.name], a.stage_index, a.microbatch_index)
            for a in listed[rank] if a is not None and a.is_compute_op
        )
        for rank in range(p)
    )
    return compile_orders(acts, rank_of_stage=tuple(rank_of(placement, p, s) for s in range(p * v)))


@pytest.mark.parametrize(
    "ours, theirs, placement, virtuals",
    [
        ("gpipe", "LoopedBFS", "loop", (2, 3)),
        ("interleaved", "Interleaved1F1B", "loop", (2, 3)),
        ("zb", "InterleavedZeroBubble", "loop", (2, 3)),
        ("zbv", "ZBVZeroBubble", "v", (2,)),
    ],
)
def test_same_actions_and_no_slower(ours, theirs, placement, virtuals):
    rng = random.Random(3)
    compared = 0
    for p in (2, 3, 4, 8):
        for v in virtuals:
            for m in (1, 2, 3, 4, 8, 12, 16, 24):
                if problems(ours, ranks=p, virtual=v, microbatches=m):
                    with pytest.raises((ValueError, AssertionError)):
                        torch_program(theirs, placement, p, v, m)
                    continue
                a = program(ours, ranks=p, virtual=v, microbatches=m)
                b = torch_program(theirs, placement, p, v, m)
                assert sorted(a.actions) == sorted(b.actions)
                assert all(x <= y for x, y in zip(a.in_flight, b.in_flight))
                for _ in range(3):
                    vector = [float(rng.randint(50, 150)) for _ in range(a.slots)]
                    vector[-1] = 0.0
                    assert step_time(a, vector) <= step_time(b, vector)
                    compared += 1
    assert compared > 50


THEIRS = {"F": "FORWARD", "B": "FULL_BACKWARD", "I": "BACKWARD_INPUT", "W": "BACKWARD_WEIGHT"}


def end_by_torch(run, lists, vector):
    """The step's end from torch's own lists with sends and receives, each action's start defined by itself."""
    places, last = run.rank_of_stage, run.stages - 1
    given = {
        r: [schedules._Action(s, schedules._ComputationType[THEIRS[kind]], mb) for kind, s, mb in order]
        for r, order in enumerate(lists)
    }
    full = schedules._add_send_recv(given, stage_to_rank=places.__getitem__, num_stages=run.stages)
    place = {
        (a.computation_type.name, a.stage_index, a.microbatch_index): (r, k)
        for r, order in full.items() for k, a in enumerate(order)
    }
    computed = {name: kind for kind, name in THEIRS.items()}

    def before(rank, k, wanted):
        return next((a for a in reversed(full[rank][:k]) if wanted(a)), None)

    def peer(a):
        to = a.stage_index + (1 if a.computation_type.name in ("SEND_F", "RECV_B") else -1)
        return places[to]

    @cache
    def computes(rank, k):
        """The end of what the rank computes before place k."""
        a = before(rank, k, lambda a: a.computation_type.name in computed)
        return 0.0 if a is None else end(*a[:3])

    @cache
    def end(stage, type, mb):
        rank, k = place[type.name, stage, mb]
        kind = computed[type.name]
        start = computes(rank, k)
        source = stage - 1 if kind == "F" else stage + 1
        if kind == "W":
            start = max(start, end(stage, schedules._ComputationType.BACKWARD_INPUT, mb))
        elif (kind == "F" and not stage) or (kind != "F" and stage == last):
            pass
        elif places[source] == rank:
            start = max(start, end(source, type, mb))
        else:
            start = max(start, sent("SEND_F" if kind == "F" else "SEND_B", source, mb))
        return start + vector[run.slot(kind, stage)]

    @cache
    def sent(name, stage, mb):
        rank, k = place[name, stage, mb]
        to = stage + 1 if name == "SEND_F" else stage - 1
        other, n = place[name.replace("SEND", "RECV"), to, mb]
        one, two = (
            before(r, i, lambda a: a.computation_type.name not in computed and peer(a) == q)
            for r, i, q in ((rank, k, other), (other, n, rank))
        )
        start = max(computes(rank, k), computes(other, n))
        if one is not None:
            # The other side of the transfer before is the one before on the other rank.
            name = one.computation_type.name
            there, back = name.replace("RECV", "SEND"), one.stage_index
            if name.startswith("RECV"):
                back += -1 if name == "RECV_F" else 1
            assert {name, two.computation_type.name} == {there, there.replace("SEND", "RECV")}
            start = max(start, sent(there, back, one.microbatch_index))
        return start + vector[run.transfer_slot(min(stage, to))]

    return max(end(*a[:3]) for order in full.values() for a in order if a.computation_type.name in computed)


@pytest.mark.parametrize("name, v", [
    ("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("zb", 1), ("zb", 3), ("zbv", 2)
])
def test_transfers_are_where_torch_has_them(name, v):
    rng = random.Random(8)
    for p, m in itertools.product((2, 3, 4), (1, 2, 4, 8)):
        if problems(name, ranks=p, virtual=v, microbatches=m):
            continue
        run = program(name, ranks=p, virtual=v, microbatches=m)
        vector = [rng.uniform(0.5, 3) for _ in range(run.slots)]
        lists = orders(name, ranks=p, virtual=v, microbatches=m)
        assert step_time(run, vector) == pytest.approx(end_by_torch(run, lists, vector)), (p, m)
