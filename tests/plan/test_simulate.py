from __future__ import annotations

import itertools
import random
from operator import mul

import pytest
from chains import step_time
from hypothesis import given, settings
from hypothesis import strategies as st

from mambadsl.plan.schedule import Action, problems
from mambadsl.plan.simulate import compile_orders, program, step_plane, timeline

F, I, W = 3.0, 2.0, 2.0  # noqa: E741


def durations(run, *, forward=F, inputs=I, weights=W, transfer=0.0, scale=None):
    """Every stage the same, its rank's work shared by its stages; or scaled stage by stage."""
    each = run.stages // len(run.lasts)
    vector = [0.0] * run.slots
    for kind in run.kinds:
        time = {"F": forward, "I": inputs, "W": weights, "B": inputs + weights}[kind]
        for s in range(run.stages):
            vector[run.slot(kind, s)] = time / each * (scale[s] if scale else 1)
    for s in range(run.stages - 1):
        if run.rank_of_stage[s] != run.rank_of_stage[s + 1]:
            vector[run.transfer_slot(s)] = transfer
    return vector


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_closed_forms_on_uniform_stages(p, rounds):
    """Step = m (f + b) of work + the published bubble."""
    m = p * rounds
    for name, virtual, bubble in [
        ("gpipe", 1, (p - 1) * (F + I + W)),
        ("gpipe", 2, (p - 1) * (F + I + W) / 2),
        ("1f1b", 1, (p - 1) * (F + I + W)),
        ("interleaved", 2, (p - 1) * (F + I + W) / 2),
        ("interleaved", 4, (p - 1) * (F + I + W) / 4),
    ]:
        run = program(name, ranks=p, virtual=virtual, microbatches=m)
        assert step_time(run, durations(run)) == pytest.approx(m * (F + I + W) + bubble), name


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("m", [2, 4])
def test_closed_forms_of_zero_bubble(p, m):
    """ZB-H1 at f = bi = bw leaves (p - 1)(f + bi - bw) / v; ZB-V its start only: half a forward a rank."""
    m *= p
    for virtual in (1, 2):
        run = program("zb", ranks=p, virtual=virtual, microbatches=m)
        time = step_time(run, durations(run, forward=6, inputs=6, weights=6))
        assert time == pytest.approx(18 * m + (p - 1) * 6 / virtual)
    run = program("zbv", ranks=p, virtual=2, microbatches=m)
    time = step_time(run, durations(run, forward=6, inputs=6, weights=6))
    assert time == pytest.approx(18 * m + (p - 1) * 3)


def test_gpipe_and_1f1b_on_unequal_stages():
    """GPipe: sum of all + (m - 1) times the slowest forward and backward. 1F1B is bounded below by any
    stage's work and the way to it and back."""
    rng = random.Random(5)
    for _ in range(50):
        p, m = rng.randint(1, 6), rng.randint(6, 12)
        scale = [rng.uniform(0.5, 2) for _ in range(p)]
        run = program("gpipe", ranks=p, virtual=1, microbatches=m)
        want = sum(scale) * (F + I + W) + (m - 1) * max(scale) * (F + I + W)
        assert step_time(run, durations(run, scale=scale)) == pytest.approx(want)
        run = program("1f1b", ranks=p, virtual=1, microbatches=m)
        bound = max((sum(scale[:s]) + m * scale[s]) * (F + I + W) for s in range(p))
        assert bound - 1e-9 <= step_time(run, durations(run, scale=scale)) <= want + 1e-9


def test_a_transfer_delays_each_way_once():
    run = program("1f1b", ranks=2, virtual=1, microbatches=2)
    assert step_time(run, durations(run, transfer=0.5)) == pytest.approx(3 * 7 + 2 * 0.5)
    # Rank 1 has the first microbatch at 1.5 and the second, sent at 2, when it is done with the first forward, at 3.
    run = program("1f1b", ranks=2, virtual=1, microbatches=2)
    by_hand = [(0, 1, "0F0"), (1, 2, "0F1"), (5, 7, "0B0"), (8, 10, "0B1")]
    times = timeline(run, durations(run, forward=1, inputs=1, weights=1, transfer=0.5))
    assert [(*span, str(action)) for *span, action in times.spans[0]] == by_hand
    by_hand = [(1.5, 2.5, "1F0"), (2.5, 4.5, "1B0"), (4.5, 5.5, "1F1"), (5.5, 7.5, "1B1")]
    assert [(*span, str(action)) for *span, action in times.spans[1]] == by_hand
    run = program("zbv", ranks=1, virtual=2, microbatches=3)  # both stages on one rank: nothing is sent
    assert step_time(run, durations(run, transfer=100.0)) == pytest.approx(3 * 7)


def test_transfers_of_two_ranks_hold_each_other_up():
    """Rank 1 takes no time. Its gradient could be sent while rank 0 computes, but is behind rank 0's next activation:
    rank 0 waits for two transfers in each turn."""
    def step(microbatches):
        run = program("1f1b", ranks=2, virtual=1, microbatches=microbatches)
        return step_time(run, durations(run, forward=1, inputs=1, weights=1, transfer=0.5, scale=[1, 0]))

    assert step(9) - step(8) == 3 + 2 * 0.5


def test_what_runs_beside_a_transfer_takes_longer():
    run = program("1f1b", ranks=2, virtual=1, microbatches=2)
    times = timeline(run, durations(run, forward=1, inputs=1, weights=1, transfer=0.5), beside=2)
    # From 1 to 1.5 rank 0 sends the first microbatch, and gets a quarter of the next one's forward done.
    by_hand = [(0, 1, "0F0"), (1, 2.25, "0F1"), (5.25, 7.25, "0B0"), (8.5, 10.5, "0B1")]
    assert [(*span, str(action)) for *span, action in times.spans[0]] == by_hand
    # Rank 1 receives the second beside its first backward, and sends the gradient beside its second forward.
    by_hand = [(1.5, 2.5, "1F0"), (2.5, 4.75, "1B0"), (4.75, 6, "1F1"), (6, 8, "1B1")]
    assert [(*span, str(action)) for *span, action in times.spans[1]] == by_hand
    assert times.step == 10.5 and times.busy == (6.25, 6.5)


cases = st.sampled_from([
    (name, p, v, m)
    for name, v in [
        ("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("zb", 1), ("zb", 3), ("zbv", 2)
    ]
    for p in (1, 2, 3, 4) for m in (1, 2, 4, 7, 8)
    if not problems(name, ranks=p, virtual=v, microbatches=m)
])


@settings(max_examples=60, deadline=None)
@given(cases, st.randoms(use_true_random=False), st.floats(1, 3))
def test_a_timeline_is_the_step_and_no_longer_than_everything_beside_a_transfer(case, rng, beside):
    name, p, v, m = case
    run = program(name, ranks=p, virtual=v, microbatches=m)
    vector = durations(run, transfer=rng.uniform(0, 2), scale=[rng.uniform(0.2, 3) for _ in range(p * v)])
    plain, slow = timeline(run, vector), timeline(run, vector, beside=beside)
    assert plain.step == step_time(run, vector) <= slow.step * (1 + 1e-12)
    assert slow.step <= step_time(run, [beside * n for n in vector]) * (1 + 1e-12)
    work = [sum(vector[run.slot(a.kind, a.stage)] for *_, a in spans) for spans in plain.spans]
    assert plain.busy == pytest.approx(tuple(work))
    assert all(x <= y * (1 + 1e-12) <= beside * x * (1 + 1e-9) for x, y in zip(plain.busy, slow.busy))


@settings(max_examples=100, deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_a_plane_is_exact_where_made_and_a_lower_bound_elsewhere(case, rng):
    name, p, v, m = case
    run = program(name, ranks=p, virtual=v, microbatches=m)

    def draw():
        return durations(run, transfer=rng.uniform(0, 2), scale=[rng.uniform(0.2, 3) for _ in range(p * v)])

    here = draw()
    step, plane = step_plane(run, here)
    assert step == step_time(run, here) == pytest.approx(sum(map(mul, plane, here)))
    for _ in range(5):
        there = draw()
        assert sum(map(mul, plane, there)) <= step_time(run, there) + 1e-9


def test_timeline_has_no_overlap_and_the_bubble_is_what_is_left():
    run = program("1f1b", ranks=4, virtual=1, microbatches=8)
    times = timeline(run, durations(run))
    assert times.step == 11 * 7 and times.busy == (56.0,) * 4
    assert times.bubble == pytest.approx(3 / 11)
    for spans in times.spans:
        assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(spans))


def test_orders_that_wait_for_each_other_are_refused():
    with pytest.raises(ValueError, match="0B0, 1F0"):
        compile_orders(((Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 1, 0),)), rank_of_stage=(0, 1))
