"""Tables of where tensors lie: whatever they say, reading back what was written gives the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambadsl.adapt.tensors import Cut, Experts, Piece, Rows, rows
from mambadsl.kinds.kind import Weight

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def there_and_back(table, weight):
    tensor = torch.randn(weight.shape)
    written = dict(table.write(tensor, weight))
    assert {name: tuple(t.shape) for name, t in written.items()} == dict(table.shapes(weight))
    assert list(written) == list(table.names())
    assert table.fits(weight, {name: tuple(t.shape) for name, t in written.items()})
    assert sum(t.numel() for t in written.values()) == weight.elements
    assert torch.equal(table.read(written.__getitem__, weight), tensor)
    return tensor, written


@given(SIZES, st.integers(1, 3), st.data())
def test_pieces_with_groups(sizes, groups, data):
    """Any division of the segments into pieces, each group by group."""
    segments = tuple((f"s{i}", n * groups) for i, n in enumerate(sizes))
    weight = Weight("w", (sum(n for _, n in segments), 3), segments=segments)
    order = data.draw(st.permutations([name for name, _ in segments]))
    cut = data.draw(st.integers(0, len(order)))
    parts = [part for part in (order[:cut], order[cut:]) if part]
    table = Rows(*(Piece(f"p{i}", tuple(part), groups) for i, part in enumerate(parts)))
    there_and_back(table, weight)


@given(SIZES, st.integers(1, 5))
def test_experts(sizes, count):
    segments = tuple((f"s{i}", n) for i, n in enumerate(sizes))
    weight = Weight("w", (count, sum(sizes), 2), segments=segments)
    table = Experts(count, *(f"{{}}.w{i}" for i in range(len(sizes)))).below("mlp.experts")
    tensor, written = there_and_back(table, weight)
    assert torch.equal(written["mlp.experts.0.w0"], tensor[0, : sizes[0]])


def test_a_head_at_a_time():
    """q of a head, then its gate."""
    weight = Weight("qkv", (10, 1), segments=(("q", 4), ("k", 1), ("v", 1), ("gate", 4)))
    table = Rows(Piece("q", ("q", "gate"), groups=2), "k", "v")
    ours = torch.arange(10.0)[:, None]
    written = dict(table.write(ours, weight))
    assert written["q"].flatten().tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    assert torch.equal(table.read(written.__getitem__, weight), ours)


def test_shapes_of_their_own():
    there_and_back(Rows(Piece("conv", shape=(-1, 1, 4))), Weight("conv", (6, 4)))
    there_and_back(Rows(Piece("gate", transposed=True)), Weight("gate", (2, 3, 5)))
    there_and_back(rows("same"), Weight("same", (7,)))
    there_and_back(rows(("a", "b")), Weight("ab", (5, 2), segments=(("x", 2), ("y", 3))))


@given(st.lists(st.integers(1, 6), min_size=3, max_size=3))
def test_cut_anywhere(sizes):
    weight = Weight("conv", (sum(sizes), 4), segments=tuple(zip("qkv", sizes)))
    table = Cut(*(Piece(name, shape=(-1, 1, 4)) for name in "qkv"))
    tensor, _ = there_and_back(table, weight)
    third = sum(sizes) // 3
    shapes = {"q": (third, 1, 4), "k": (third, 1, 4), "v": (sum(sizes) - 2 * third, 1, 4)}
    written = dict(table.write(tensor, weight, shapes))
    assert {name: tuple(t.shape) for name, t in written.items()} == shapes
    assert table.fits(weight, shapes) and not table.fits(weight, {**shapes, "q": (third + 1, 1, 4)})
    assert torch.equal(table.read(written.__getitem__, weight), tensor)


def test_tables_that_do_not_cover_the_weight():
    weight = Weight("w", (6, 2), segments=(("a", 2), ("b", 2), ("c", 2)))
    for table in Rows("x", "y"), Rows("x", "y", "z", "more"), Rows(Piece("x", ("a", "b")), Piece("y", ("b", "c"))):
        with pytest.raises(ValueError, match="segments"):
            dict(table.shapes(weight))


def test_one_tensor_in_another_order():
    weight = Weight("qkv", (6, 1), segments=(("q", 3), ("k", 2), ("gate", 1)))
    table = Rows(Piece("mixed", ("gate", "q", "k")))
    ours = torch.arange(6.0)[:, None]
    written = dict(table.write(ours, weight))
    assert written["mixed"].flatten().tolist() == [5, 0, 1, 2, 3, 4]
    assert torch.equal(table.read(written.__getitem__, weight), ours)
