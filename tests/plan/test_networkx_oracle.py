"""networkx as the judge: the planner's cuts and crossing tensors, derived a second way on graphs."""

from __future__ import annotations

import random
from itertools import accumulate

import networkx as nx
import pytest

import mambadsl
from mambadsl.plan.device import device
from mambadsl.plan.from_graph import units
from mambadsl.plan.partition import min_max


def bottleneck_path(prefix, stages, edge):
    """The min-max split as a path through (stage, cut): the least weight limit under which one exists."""
    n = len(prefix) - 1
    g = nx.DiGraph()
    for stage in range(stages):
        for i in range(n):
            for j in range(i + 1, n + 1):
                if (i == 0) == (stage == 0) and (j == n) == (stage == stages - 1):
                    g.add_edge((stage, i), (stage + 1, j), w=prefix[j] - prefix[i] + edge[i] + edge[j])
    weights = sorted({w for *_, w in g.edges(data="w")})
    low, high = 0, len(weights) - 1

    def reachable(limit):
        view = nx.subgraph_view(g, filter_edge=lambda u, v: g[u][v]["w"] <= limit)
        return nx.has_path(view, (0, 0), (stages, n))

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reachable(weights[middle]) else (middle + 1, high)
    return weights[low]


@pytest.mark.parametrize("seed", range(12))
def test_min_max_is_the_bottleneck_path(seed):
    rng = random.Random(seed)
    n, stages = rng.randint(12, 26), rng.randint(2, 5)
    prefix = list(accumulate((rng.randint(1, 50) for _ in range(n)), initial=0))
    edge = [0, *(rng.randint(0, 12) for _ in range(n - 1)), 0]
    assert min_max(prefix, stages, edge=edge)[0] == bottleneck_path(prefix, stages, edge)


CARRIED = "layer Z = A(input=with_embedding)\nshared S = [A(input=with_embedding) F]\nstack { M M Z M [M S]*2 M F }"


@pytest.mark.parametrize("text", ["M A M F", CARRIED])
def test_bytes_over_a_cut_are_the_tensors_that_cross_it(text):
    """Each tensor made before a cut and read after it crosses once."""
    program = mambadsl.load(text=text)
    graph = program.graph
    chain = units(program.layers, device=device("h200"), length=16, sequences=3)
    order = [unit.path for unit in chain]
    assert order == list(nx.lexicographical_topological_sort(graph, key=order.index))
    for at, unit in enumerate(chain[:-1]):
        before = set(order[: at + 1])
        crossing = {
            (u if tensor == "x0" else None, tensor): width
            for u, v, tensors in graph.edges(data="tensors") for tensor, width in tensors.items()
            if u in before and v not in before
        }
        assert unit.out_bytes == sum(crossing.values()) * 2 * 16 * 3, unit.path


def test_every_node_lies_between_embedding_and_head():
    graph = mambadsl.load(text=CARRIED).graph
    assert nx.is_directed_acyclic_graph(graph)
    stack = [n for n in graph if n.startswith("stack.")]
    assert all(n in nx.ancestors(graph, "head") and n in nx.descendants(graph, "embed") for n in stack)
    dominators = nx.immediate_dominators(graph, "embed")
    at, chain = "head", []
    while at not in (None, "embed"):
        at = dominators[at]
        chain.append(at)
    assert chain[-1] == "embed" and len(chain) >= 2
