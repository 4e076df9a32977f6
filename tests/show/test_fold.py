"""Folding: nothing lost, nothing moved, and what the source repeats is there once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from show_models import program

from mambadsl import load
from mambadsl.show.fold import Group, Leaf, fold, leaves

letters = st.sampled_from(["M", "A", "F"])
patterns = st.recursive(
    letters,
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)).map(
        lambda drawn: f"[{' '.join(drawn[0])}]" + (f"*{drawn[1]}" if drawn[1] > 1 else "")
    ),
    max_leaves=8,
)
stacks = st.lists(patterns, min_size=1, max_size=4).map(" ".join)


def shape(items) -> list:
    """(label, count, inside) of every item, without the nodes."""
    return [(i.label, i.count, shape(i.items) if isinstance(i, Group) else None) for i in items]


def unfolded(items) -> list[str]:
    """Labels in running order, repeats written out."""
    found: list[str] = []
    for item in items:
        found += ([item.label] if isinstance(item, Leaf) else unfolded(item.items)) * item.count
    return found


def uses(items, around: int = 1) -> bool:
    """Whether each leaf has as many nodes as its place says."""
    return all(
        len(i.nodes) == i.count * around if isinstance(i, Leaf) else uses(i.items, around * i.count) for i in items
    )


@settings(max_examples=60, deadline=None)
@given(stacks)
def test_unfolding_gives_the_layers_back(text):
    graph = load(text=text, set={"d_model": "64"}).layers
    items = fold(graph)
    assert unfolded(items) == ["embed", *(n.layer.label for n in graph.layers), "head"]
    assert uses(items)
    assert sorted(n.path for leaf in leaves(items) for n in leaf.nodes) == sorted(graph.by_path)


@settings(max_examples=30, deadline=None)
@given(stacks, st.integers(1, 9))
def test_no_leaf_lies_across_a_border(text, every):
    graph = load(text=text, set={"d_model": "64"}).layers
    number = {node.path: i // every for i, node in enumerate(graph.nodes)}
    items = fold(graph, tag=lambda node: number[node.path])
    for leaf in leaves(items):
        assert {number[n.path] for n in leaf.nodes} == {leaf.tag}
    assert unfolded(items) == ["embed", *(n.layer.label for n in graph.layers), "head"]


def test_groups_are_the_source_s():
    items = fold(program("nemotron_h_8b").layers)
    one = [("M", 1, None), ("F", 1, None)]
    tail = [("M", 1, None), ("A", 1, None), ("F", 1, None)]
    assert shape(items) == [
        ("embed", 1, None),
        ("M F", 3, one),
        *tail,
        ("[M F]*4 M A F", 3, [("M F", 4, one), *tail]),
        ("M F", 5, one),
        ("head", 1, None),
    ]


def test_named_blocks_and_shared_layers():
    items = fold(program("shared").layers)
    assert [(label, count) for label, count, _ in shape(items)] == [
        ("embed", 1),
        ("M", 4),
        ("S", 1),
        ("M", 1),
        ("T", 2),
        ("Local", 3),
        ("M S", 3),
        ("M T", 2),
        ("S", 1),
        ("head", 1),
        ("mtp", 2),
    ]
    owners = {leaf.label: leaf.shared for leaf in leaves(items) if leaf.shared}
    assert owners["T"] == "shared.T"


def test_neighbours_written_one_by_one_fold():
    assert shape(fold(load(text="M M M A M").layers))[1:-1] == [("M", 3, None), ("A", 1, None), ("M", 1, None)]


def test_a_pass_that_differs_stays_apart():
    """A cut in the first pass only: with stages as tags the passes are told apart."""
    graph = load(text="stack { M F | [M F]*4 }").layers
    first = {n.path for n in graph.nodes[:5]}
    items = fold(graph, tag=lambda node: node.path in first)
    assert shape(items)[3:5] == [
        ("M F", 1, [("M", 1, None), ("F", 1, None)]),
        ("M F", 3, [("M", 1, None), ("F", 1, None)]),
    ]
