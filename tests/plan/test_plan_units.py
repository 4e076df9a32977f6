from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from chains import hybrid, uniform, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from mambadsl.plan.device import DEVICES
from mambadsl.plan.plan import plan_units
from mambadsl.plan.schedule import SCHEDULES, problems
from mambadsl.text.diagnostic import MdlError

GIB = 2**30
HEAVY = {"static_bytes": 3 * GIB, "activation_bytes": GIB // 2, "params": 150_000_000}


def codes(error):
    return [d.code.id for d in error.value.diagnostics]


def marked(units, *after):
    return [replace(u, cut_after=k in after) for k, u in enumerate(units, 1)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 14), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4),
    st.lists(st.booleans(), min_size=14, max_size=14),
)
def test_every_unit_once_in_order_and_only_legal_cuts(seed, length, schedule, stages, legal):
    chain = [replace(u, can_cut_after=ok) for u, ok in zip(hybrid(seed, length), legal)]
    virtual = SCHEDULES[schedule].default_virtual
    places = 1 + sum(u.can_cut_after for u in chain[:-1])
    try:
        plan = plan_units(chain, stages=stages, schedule=schedule)
    except MdlError as error:
        assert [d.code.id for d in error.diagnostics] == ["E802"] and places < stages * virtual
        return
    assert [path for stage in plan.stages for path in stage.paths] == [u.path for u in chain]
    assert all(chain[cut - 1].can_cut_after for cut in plan.cuts[1:-1])
    assert [plan.stage_of(u.path) for u in chain] == sorted(plan.stage_of(u.path) for u in chain)
    assert plan.microbatches == 4 * stages and not plan.microbatches_given
    assert 0 <= plan.bubble < 1 and len(plan.peak_bytes) == len(plan.idle) == stages


def test_uniform_stack_is_cut_evenly_and_costs_what_the_formula_says():
    device = replace(DEVICES["h200"], action_s=0.0, link_latency_s=0.0, beside_transfer=1.0)
    plan = plan_units(uniform(24, out_bytes=0), stages=4, microbatches=8, device=device)
    assert plan.cuts == (0, 6, 12, 18, 24)
    assert plan.step_s == pytest.approx((8 + 3) * 6 * 3e-3)
    assert plan.bubble == pytest.approx(3 / 11)
    assert plan.idle == pytest.approx((3 / 11,) * 4)


def test_peak_memory_by_hand():
    chain = uniform(8, static_bytes=1000, activation_bytes=10, working_bytes=7, out_bytes=3)
    plan = plan_units(chain, stages=4, microbatches=8)
    inner, outer = 2 * 8 * 3, 8 * 3  # a buffer for each microbatch and each direction
    assert plan.peak_bytes == tuple(
        2000 + 20 * flight + 7 + buffers
        for flight, buffers in [(4, outer), (3, inner), (2, inner), (1, outer)]
    )


def test_shared_weights_cost_once_in_each_stage():
    shared = {"owner": "shared.S", "shared_bytes": 100, "shared_params": 50}
    chain = [replace(u, **shared) if k % 2 else u for k, u in enumerate(uniform(8, out_bytes=0))]
    plan = plan_units(marked(chain, 5), microbatches=2)
    assert [s.static_bytes for s in plan.stages] == [100, 100] and [s.params for s in plan.stages] == [50, 50]
    assert plan.replicas == (("shared.S", (0, 1)),)
    assert plan_units(marked(chain, 1), microbatches=2).stages[0].static_bytes == 0


def test_marks_decide_and_are_compared_with_the_planners_cuts():
    chain = marked(hybrid(4, 20, head=1.0), 3, 9, 16)
    plan = plan_units(chain)
    assert plan.cuts == (0, 3, 9, 16, 20) and plan.cuts_given and plan.ranks == 4 and plan.next_best is None
    assert plan.own_cuts.worse_by < 0 and plan.own_cuts.step_s < plan.step_s
    free = plan_units([replace(u, cut_after=False) for u in chain], stages=4)
    assert free.cuts == plan.own_cuts.cuts and free.step_s == plan.own_cuts.step_s
    assert plan_units(chain, stages=4).cuts == plan.cuts
    assert plan_units(chain, schedule="interleaved").ranks == 2


@pytest.mark.parametrize("options", [{"stages": 3}, {"stages": 4, "virtual": 2, "schedule": "zb"},
                                     {"schedule": "interleaved", "virtual": 3}])
def test_marks_and_another_number_of_stages(options):
    with pytest.raises(MdlError) as error:
        plan_units(marked(hybrid(4, 20), 3, 9, 16), **options)
    assert codes(error) == ["E801"]


def test_more_stages_than_places():
    chain = [replace(u, can_cut_after=k % 2 == 0) for k, u in enumerate(uniform(9))]
    with pytest.raises(MdlError) as error:
        plan_units(chain, stages=7)
    assert codes(error) == ["E802"] and "at most 5 stages" in error.value.diagnostics[0].help[0]
    assert len(plan_units(chain, stages=5).stages) == 5
    for stages in (0, -1):
        with pytest.raises(MdlError) as error:
            plan_units(chain, stages=stages)
        assert codes(error) == ["E802"]


def test_a_mark_where_nothing_can_be_sent():
    chain = marked([replace(u, can_cut_after=u.path != "stack.4") for u in uniform(9)], 5)
    with pytest.raises(MdlError) as error:
        plan_units(chain)
    assert codes(error) == ["E804"] and "`stack.3` and `stack.5`" in error.value.diagnostics[0].help[0]
    with pytest.raises(MdlError) as error:
        plan_units(marked(uniform(4), 4))
    assert codes(error) == ["E804"]


def test_what_does_not_fit_says_what_would():
    chain = hybrid(1, 54, head=2.4, **HEAVY)
    with pytest.raises(MdlError) as error:
        plan_units(chain, stages=2, memory_limit=60 * GIB)
    (problem,) = error.value.diagnostics
    assert problem.code.id == "E803"
    would_do = float(problem.message.split(",")[1].split(" GiB")[0])
    assert max(plan_units(chain, stages=2, memory_limit=int((would_do + 0.1) * GIB)).peak_bytes) > 60 * GIB
    enough = int(problem.help[0].split()[0])
    assert max(plan_units(chain, stages=enough, memory_limit=60 * GIB).peak_bytes) <= 60 * GIB
    with pytest.raises(MdlError):
        plan_units(chain, stages=enough - 1, memory_limit=60 * GIB)


def test_marks_that_do_not_fit_while_other_cuts_do():
    chain = marked(uniform(8, static_bytes=GIB), 6)
    with pytest.raises(MdlError) as error:
        plan_units(chain, memory_limit=5 * GIB)
    assert codes(error) == ["E803"] and "take the `|` out" in error.value.diagnostics[0].help[0]


def test_the_slowest_stage_and_why():
    head = [replace(u, detail="131,072 x 4,096 logits") if u.path == "head" else u
            for u in hybrid(1, 30, head=9.0)]
    plan = plan_units(head, stages=8)
    assert plan.stages[plan.slowest].paths[-1] == "head"
    assert plan.why.startswith("`head` (131,072 x 4,096 logits) alone takes as long as")
    assert "`|`" in plan_units(marked(uniform(9), 6)).why
    chain = [unit(f"stack.{n}", static_bytes=GIB * (4 if n < 4 else 1)) for n in range(12)]
    assert "layers are whole" in plan_units(hybrid(2, 30, head=1.0), stages=4).why
    assert "no memory left" in plan_units(chain, stages=2, memory_limit=17 * GIB).why


def test_plain_data_and_deterministic():
    def once():
        return json.dumps(plan_units(hybrid(7, 30, **HEAVY), stages=4, schedule="zbv").to_json())

    assert once() == once()
    assert json.loads(once())["stages"][0]["paths"][0] == "embed"


def test_orders_of_a_plan_run_its_schedule():
    plan = plan_units(hybrid(7, 30), stages=4, schedule="interleaved", microbatches=8, virtual=3)
    assert sum(map(len, plan.orders())) == 2 * 8 * 12
    assert not problems("interleaved", ranks=4, virtual=3, microbatches=8)


@pytest.mark.parametrize(
    "length, options, seconds",
    [
        (54, {"stages": 8}, 0.5),
        (120, {"stages": 16}, 2.0),
        (120, {"stages": 8, "schedule": "interleaved", "virtual": 4}, 2.0),
        (120, {"stages": 16, "schedule": "zbv"}, 2.0),
        (10_000, {"stages": 64}, 3.0),
    ],
)
def test_in_time(length, options, seconds):
    chain = hybrid(1, length, **(HEAVY if length < 1000 else {}))
    start = time.thread_time()
    plan_units(chain, **options)
    assert time.thread_time() - start < seconds
