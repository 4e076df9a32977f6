from __future__ import annotations

import time
from itertools import accumulate, combinations, combinations_with_replacement, pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mambadsl.plan.partition import Room, fold_loop, fold_v, least_limit, min_max, rank_load

INF = float("inf")
costs = st.lists(st.integers(0, 20), min_size=1, max_size=10)


def prefix_of(values):
    return list(accumulate(values, initial=0))


def brute(prefix, stages, edge, room):
    """Every split, tried."""
    n, best = len(prefix) - 1, INF
    for inner in combinations(range(1, n), stages - 1):
        cuts = (0, *inner, n)
        parts = list(pairwise(cuts))
        if room and not all(room.holds(s, a, b) for s, (a, b) in enumerate(parts)):
            continue
        best = min(best, max(prefix[b] - prefix[a] + edge[a] + edge[b] for a, b in parts))
    return best


@st.composite
def problems(draw):
    values = draw(costs)
    n, stages = len(values), draw(st.integers(1, 5))
    ends = st.lists(st.integers(0, 15), min_size=max(n - 1, 0), max_size=max(n - 1, 0))
    edge = [0, *draw(ends), 0]
    static = prefix_of(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    kept = prefix_of(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    buffer = [0, *draw(ends), 0]
    flights = draw(st.lists(st.integers(0, 6), min_size=stages, max_size=stages))
    room = Room(
        lambda s, a, b: static[b] - static[a] + flights[s] * (kept[b] - kept[a]),
        buffer, draw(st.integers(0, 90)),
    )
    return prefix_of(values), stages, edge, draw(st.sampled_from([None, room]))


@settings(max_examples=600, deadline=None)
@given(problems())
def test_min_max_is_the_least_of_all_splits(problem):
    prefix, stages, edge, room = problem
    found, best = min_max(prefix, stages, edge=edge, room=room), brute(*problem)
    if found is None:
        assert best == INF
        return
    value, cuts = found
    assert value == best
    assert cuts[0] == 0 and cuts[-1] == len(prefix) - 1 and len(cuts) == stages + 1
    parts = list(pairwise(cuts))
    assert all(a < b for a, b in parts)
    assert value == max(prefix[b] - prefix[a] + edge[a] + edge[b] for a, b in parts)
    assert room is None or all(room.holds(s, a, b) for s, (a, b) in enumerate(parts))


def _full_in_the_middle():
    """Memory is largest where the most microbatches are in flight, and that need not be at either end."""
    kept, flights = [0, 0, 1, 1], [0, 4, 3]
    return [0] * 4, 3, [0] * 4, Room(lambda s, a, b: flights[s] * (kept[b] - kept[a]), [0, 5, 5, 1], 0)


@settings(max_examples=150, deadline=None)
@given(problems().filter(lambda p: p[3] is not None))
@example(_full_in_the_middle())
def test_least_limit_is_just_enough(problem):
    prefix, stages, _, room = problem
    if len(prefix) - 1 < stages:
        return
    free = [0] * len(prefix)
    least = least_limit(prefix, stages, room=room)
    assert brute(prefix, stages, free, Room(room.solid, room.edge, least)) < INF
    if least > 1:
        assert brute(prefix, stages, free, Room(room.solid, room.edge, least * 0.998 - 1e-9)) == INF


@settings(max_examples=150, deadline=None)
@given(costs.filter(lambda c: len(c) <= 7), st.integers(1, 3), st.sampled_from(["v", "loop"]))
def test_folds_are_the_least_of_all_splits(values, ranks, placement):
    prefix = prefix_of(values)
    n = len(values)
    best = min(
        rank_load(prefix, (0, *inner, n), ranks=ranks, placement=placement)
        for inner in combinations_with_replacement(range(n + 1), 2 * ranks - 1)
    )
    value, cuts = (fold_v if placement == "v" else fold_loop)(prefix, ranks)
    assert value == best == rank_load(prefix, cuts, ranks=ranks, placement=placement)
    assert cuts[0] == 0 and cuts[-1] == n and len(cuts) == 2 * ranks + 1 and cuts == sorted(cuts)


def test_ten_thousand_layers_for_sixty_four_stages():
    values = [1000 + (k * 7919) % 613 for k in range(10_000)]
    edge = [0, *[50] * 9_999, 0]
    static = prefix_of(values)
    room = Room(lambda s, a, b: static[b] - static[a], edge, 1.05 * sum(values) / 64)
    start = time.thread_time()
    value, cuts = min_max(prefix_of(values), 64, edge=edge, room=room)
    assert time.thread_time() - start < 2
    assert len(cuts) == 65 and value < sum(values) / 64 + 100 + 1613
