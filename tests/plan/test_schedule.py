from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambadsl.plan.schedule import SCHEDULES, nearest_microbatches, orders, problems, rank_of
from mambadsl.plan.simulate import ACTIVATION, GRADIENT, program
from mambadsl.text.diagnostic import MdlError


@st.composite
def counts(draw):
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    low, high = SCHEDULES[name].virtual
    ranks, virtual = draw(st.integers(1, 7)), draw(st.integers(low, high or 4))
    return name, ranks, virtual, draw(st.integers(1, 20))


@settings(max_examples=400, deadline=None)
@given(counts())
def test_every_action_once_and_no_deadlock(case):
    name, ranks, virtual, microbatches = case
    if problems(name, ranks=ranks, virtual=virtual, microbatches=microbatches):
        with pytest.raises(MdlError):
            orders(name, ranks=ranks, virtual=virtual, microbatches=microbatches)
        return
    run = program(name, ranks=ranks, virtual=virtual, microbatches=microbatches)  # raises on a deadlock
    wanted = {
        (kind, s, mb)
        for kind in SCHEDULES[name].kinds for s in range(ranks * virtual) for mb in range(microbatches)
    }
    ran = [action for action in run.actions if action.kind not in (ACTIVATION, GRADIENT)]
    assert len(ran) == len(wanted) and set(ran) == wanted
    for rank, order in enumerate(orders(name, ranks=ranks, virtual=virtual, microbatches=microbatches)):
        assert {rank_of(SCHEDULES[name].placement, ranks, a.stage) for a in order} == {rank}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("virtual", [2, 3])
def test_in_flight_table(ranks, virtual):
    """Microbatches that each rank keeps, as published for each schedule; m = 4 * ranks."""
    m, r = 4 * ranks, range(ranks)

    def flight(name, v):
        return program(name, ranks=ranks, virtual=v, microbatches=m).in_flight

    assert flight("gpipe", 1) == (m,) * ranks
    assert flight("gpipe", virtual) == (m * virtual,) * ranks
    assert flight("1f1b", 1) == tuple(ranks - k for k in r)
    assert flight("interleaved", virtual) == tuple(
        min((virtual - 1) * ranks + 2 * (ranks - 1 - k) + 1, virtual * m) for k in r
    )
    assert flight("zb", 1) == (ranks,) * ranks
    assert flight("zb", virtual) == (virtual * ranks,) * ranks
    assert flight("zbv", 2) == (2 * ranks,) * ranks


def test_the_nearest_legal_numbers_of_microbatches():
    assert nearest_microbatches("1f1b", ranks=8, microbatches=5) == [8]
    assert nearest_microbatches("interleaved", ranks=2, microbatches=5) == [4, 6]
    for ranks in range(1, 9):
        for m in range(1, 40):
            for name in SCHEDULES:
                near = nearest_microbatches(name, ranks=ranks, microbatches=m)
                virtual = SCHEDULES[name].default_virtual
                assert near
                for n in near:
                    assert not problems(name, ranks=ranks, virtual=virtual, microbatches=n)


@pytest.mark.parametrize(
    "name, virtual, m, codes",
    [
        ("1f2b", 1, 8, ["E810"]),
        ("1f1b", 1, 3, ["E811"]),
        ("1f1b", 2, 8, ["E812"]),
        ("interleaved", 1, 9, ["E812", "E811"]),
        ("interleaved", 2, 9, ["E811"]),
        ("zbv", 3, 1, ["E812"]),
        ("gpipe", 5, 0, ["E811"]),
        ("zbv", 2, 1, []),
    ],
)
def test_counts_that_cannot_run(name, virtual, m, codes):
    found = problems(name, ranks=4, virtual=virtual, microbatches=m)
    assert [d.code.id for d in found] == codes
    assert all(d.help for d in found)
