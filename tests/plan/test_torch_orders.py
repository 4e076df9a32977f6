"""The schedules of torch.distributed.pipelining as the truth from outside: the same actions, the same
microbatches in flight, and no slower on unequal stages."""

from __future__ import annotations

import random

import pytest

from mambadsl.plan.schedule import Action, problems, rank_of
from mambadsl.plan.simulate import compile_orders, program, step_time

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
