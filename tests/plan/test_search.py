from __future__ import annotations

import pytest
from chains import exhaustive, hybrid, pricing, step_time, unit

from mambadsl.plan.search import search, seeds

CASES = [
    # schedule, ranks, virtual, microbatches, units, chains
    ("gpipe", 4, 1, 8, 16, 3),
    ("1f1b", 4, 1, 4, 16, 4),
    ("1f1b", 4, 1, 8, 16, 4),
    ("1f1b", 5, 1, 20, 14, 3),
    ("interleaved", 3, 2, 6, 14, 5),
    ("interleaved", 4, 2, 8, 13, 4),
    ("interleaved", 2, 3, 8, 14, 4),
    ("zb", 4, 1, 8, 16, 4),
    ("zb", 4, 2, 8, 13, 4),
    ("zb", 3, 2, 3, 14, 5),
    ("zbv", 4, 2, 8, 13, 4),
    ("zbv", 3, 2, 2, 14, 5),
]


@pytest.mark.parametrize("schedule, ranks, virtual, microbatches, length, chains", CASES)
def test_within_half_a_percent_of_the_optimum(schedule, ranks, virtual, microbatches, length, chains):
    for seed in range(chains):
        chain = hybrid(seed, length)
        price = pricing(chain, schedule, ranks=ranks, virtual=virtual, microbatches=microbatches)
        found, best = search(price), min(exhaustive(price))
        assert best[0] <= found.step <= 1.005 * best[0], seed
        assert found.step == step_time(price.program, price.durations(found.cuts))


@pytest.mark.parametrize("schedule, virtual", [("1f1b", 1), ("interleaved", 2), ("zbv", 2)])
def test_memory_limits_are_kept_and_more_memory_never_hurts(schedule, virtual):
    for seed in range(2):
        chain = hybrid(seed, 12, static_bytes=10_000, activation_bytes=700, working_bytes=300, out_bytes=50)
        free = pricing(chain, schedule, ranks=3, virtual=virtual, microbatches=6)
        peaks = sorted({max(free.peaks(cuts)) for _, cuts in exhaustive(free)})
        last = float("inf")
        for limit in [peaks[0] - 1, *peaks[:: max(1, len(peaks) // 4)], peaks[-1]]:
            price = pricing(chain, schedule, ranks=3, virtual=virtual, microbatches=6, limit=limit)
            best, found = min(exhaustive(price), default=None), search(price)
            assert (found is None) == (best is None)
            if found:
                assert max(price.peaks(found.cuts)) <= limit
                assert found.step <= min(last, 1.005 * best[0])
                last = found.step


def test_the_next_best_is_another_split_and_no_better():
    price = pricing(hybrid(1, 14), "1f1b", ranks=4, microbatches=8)
    found = search(price)
    ranked = sorted(exhaustive(price))
    assert found.next_cuts != found.cuts and found.next_step >= found.step
    assert found.next_step <= 1.01 * ranked[1][0]


def test_one_possible_split_has_no_next_best():
    found = search(pricing(hybrid(1, 4), "1f1b", ranks=4, microbatches=4))
    assert found.cuts == (0, 1, 2, 3, 4) and found.next_cuts is None and found.next_step is None


def test_the_same_twice():
    def once():
        return search(pricing(hybrid(3, 40), "interleaved", ranks=4, virtual=2, microbatches=16))

    assert once() == once()


def test_the_exact_rank_balance_is_among_the_seeds():
    price = pricing(hybrid(2, 20), "zbv", ranks=3, virtual=2, microbatches=6)
    assert len(set(seeds(price))) >= 2


def test_times_of_zero_do_not_divide():
    chain = [unit(f"stack.{n}", 0.0, 0.0) for n in range(6)]
    assert search(pricing(chain, "1f1b", ranks=3, microbatches=6)) is not None
