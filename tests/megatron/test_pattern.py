"""Patterns mean what Megatron-Core's mean: results 1 to 24 of its allocation of layers (as of August 2026), and errors
with a place where it goes on with layers lost, used twice, or of two sorts that exclude each other."""

from __future__ import annotations

import pytest

from mambadsl.megatron.pattern import from_ratios, held, read_pattern, stages
from mambadsl.text.diagnostic import MdlError


def refused(do):
    """(message, text under the caret) of each problem."""
    with pytest.raises(MdlError) as caught:
        do()
    assert {d.code.id for d in caught.value.diagnostics} == {"E620"}
    return [(d.message, d.span.text) for d in caught.value.diagnostics]


# ---- 1 to 7: parsing


@pytest.mark.parametrize("text, main, mtp, depths", [
    ("M*M*", "M*M*", "", 0), ("GEGEGE*E", "GEGEGE*E", "", 0), ("M+M+", "M+M+", "", 0), ("MDMD", "MDMD", "", 0),
    ("M*M*/MM/MM", "M*M*", "MM", 2), ("MMMM/*M/*M/*M", "MMMM", "*M", 3), ("M*/*/*/*", "M*", "*", 3),
    ("M/M/M/M/M", "M", "M", 4), ("M-M-|M-M*-/MM/MM", "M-M-|M-M*-", "MM", 2), ("M*M*/", "M*M*", "", 0),
])
def test_parts_of_a_pattern(text, main, mtp, depths):
    found = read_pattern(text)
    assert (found.main, found.mtp, found.depths) == (main, mtp, depths)


@pytest.mark.parametrize("text, guilty", [
    ("M*M*/MM/M*", "M*"), ("M*M*/MM/MM/M", "M"), ("MMMM/*M/M*", "M*"),
])
def test_predicted_tokens_have_the_same_layers(text, guilty):
    [(message, under)] = refused(lambda: read_pattern(text))
    assert "every predicted token has the same layers" in message and under == guilty


def test_two_problems_are_two_errors():
    found = refused(lambda: read_pattern("M*M*/MM/Ma"))
    assert [under for _, under in found] == ["a", "Ma"]


@pytest.mark.parametrize("text, guilty", [
    ("M*X*", ["X"]), ("MaMM", ["a"]), ("M*M*1", ["1"]), ("M*M*/MX", ["X"]), ("M*M*/Ma/Ma", ["a", "a"]),
    ("M*M*/M|M/M|M", ["|", "|"]), ("M *", [" "]), ("m*", ["m"]),
])
def test_what_is_no_layer(text, guilty):
    assert [under for _, under in refused(lambda: read_pattern(text))] == guilty


@pytest.mark.parametrize("text", ["", "/MM/MM", "||"])
def test_no_layers(text):
    """Megatron builds a model of none."""
    assert refused(lambda: read_pattern(text))[0][0] == "a pattern without layers"


@pytest.mark.parametrize("text, guilty", [("M*M+", "+"), ("*D", "D"), ("MDM*-", "D"), ("M*/M+", "+"), ("M+/M*", "+")])
def test_two_sorts_of_attention(text, guilty):
    """The last two: Megatron looks at the parts one by one and lets them pass."""
    assert refused(lambda: read_pattern(text)) == [(f"`*` and `{guilty}` cannot be in one model", guilty)]


# ---- 8, 9: counting


@pytest.mark.parametrize("text, counts", [
    ("M-M-|M-M*-/MM/MM", {"*": 1, "D": 0, "G": 0, "M": 8, "+": 0, "-": 4, "E": 0}),
    ("MMMM/*M/*M/*M", {"*": 3, "M": 7}), ("MG*-E", {"M": 1, "G": 1, "*": 1, "-": 1, "E": 1}),
])
def test_counts(text, counts):
    found = read_pattern(text).counts()
    assert {letter: n for letter, n in found.items() if n} == {letter: n for letter, n in counts.items() if n}


@pytest.mark.parametrize("text, layers, segments", [
    ("M-M-|M-M*-", 9, 2), ("||M", 1, 3), ("M*M*/MM/MM", 4, 1), ("M*M*", 4, 1), ("M|M|M|M", 4, 4),
    ("M-M-|M-M*-/MM/MM", 9, 2), ("GGG*GGG*", 8, 1),
])
def test_layers_and_segments(text, layers, segments):
    found = read_pattern(text)
    assert (len(found.layers), len(found.segments)) == (layers, segments)


# ---- 11 to 17: pipelines


def dealt(text, ranks, **ends):
    """(rank, chunk) -> the layers there and the number of the first."""
    pattern = read_pattern(text)
    counts = stages(pattern, ranks, **ends)
    found = {}
    for rank in range(ranks):
        for chunk, segment in enumerate(held(rank, ranks, len(counts))):
            start = sum(counts[:segment])
            found[rank, chunk] = (pattern.layers[start : start + counts[segment]], start)
    assert sum(len(layers) for layers, _ in found.values()) == len(pattern.layers)
    return found


@pytest.mark.parametrize("text, ranks, wanted", [
    ("M-M-|M-M*-", 1, {(0, 0): ("M-M-", 0), (0, 1): ("M-M*-", 4)}),
    ("MM|M*|M-|ME", 1, {(0, 0): ("MM", 0), (0, 1): ("M*", 2), (0, 2): ("M-", 4), (0, 3): ("ME", 6)}),
    ("||M*", 1, {(0, 0): ("", 0), (0, 1): ("", 0), (0, 2): ("M*", 0)}),
    ("MMM|M|MMMMM", 1, {(0, 0): ("MMM", 0), (0, 1): ("M", 3), (0, 2): ("MMMMM", 4)}),
    ("MM|M*|M-|ME", 2, {(0, 0): ("MM", 0), (1, 0): ("M*", 2), (0, 1): ("M-", 4), (1, 1): ("ME", 6)}),
    ("M*M-", 2, {(0, 0): ("M*", 0), (1, 0): ("M-", 2)}),
])
def test_segments_of_ranks(text, ranks, wanted):
    assert dealt(text, ranks) == wanted


@pytest.mark.parametrize("text, ranks, ends, says", [
    ("M|M|M", 2, {}, "3 segments cannot be dealt out to 2"), ("M*M*M*", 4, {}, "6 layers cannot be cut evenly into 4"),
    ("M*|M*", 2, {"first": 1}, "the cuts say how many layers"),
    ("M*M*M*M*M", 4, {"first": 2}, "7 layers cannot be cut evenly into 3 stages between"),
])
def test_no_such_split(text, ranks, ends, says):
    assert says in refused(lambda: stages(read_pattern(text), ranks, **ends))[0][0]


@pytest.mark.parametrize("text, ends, sizes", [
    ("M*M*M*", {"first": 3}, (3, 1, 1, 1)), ("M*M*M*", {"last": 3}, (1, 1, 1, 3)),
    ("M*M*M*M*", {"first": 1, "last": 1}, (1, 3, 3, 1)),
])
def test_uneven_splits(text, ends, sizes):
    assert stages(read_pattern(text), 4, **ends) == sizes


def test_layers_that_megatron_drops():
    """Two ranks with two layers each, of eight: it runs 0, 1, 6 and 7."""
    [(message, under)] = refused(lambda: stages(read_pattern("M*M-EM*-"), 2, first=2, last=2))
    assert message.startswith("4 layers are in no stage") and under == "M-EM"


def test_layers_that_megatron_uses_twice():
    [(message, under)] = refused(lambda: stages(read_pattern("M*ME"), 3, first=3, last=3))
    assert message == "the ends have 6 layers, the stack has 4" and under == "*M"


# ---- 19 to 24: shares of layers


@pytest.mark.parametrize("layers, attention, mlp, wanted", [
    (8, 0, 0, "MMMMMMMM"), (1, 0, 0, "M"), (1, 1, 0, "*"), (10, 0.3, 0, "MM*MM*M*MM"), (10, 0.3, 0.3, "M-*MM*-*M-"),
    (10, 0.5, 0, "M*M*M**M*M"), (12, 0.25, 0.25, "MM*-MM*-M*M-"), (10, 0.25, 0, "MMM*MM*MMM"), (5, 0.1, 0, "MMMMM"),
    (56, 0.08, 0.5, "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"),
    (24, 0.125, 0.5, "M-M--*M-M-M-*-M-M-*M--M-"),
    (52, 0.115, 0.4423, "M-M-M-M*-M-M-M*-M-M-M-*M-M-M-*M-M-M-M*-M-M-M*-M-M-M-"),
    # Two MLPs are asked for, and Megatron has room for one: models were trained so.
    (3, 0.5, 0.5, "*-*"),
])
def test_patterns_of_shares(layers, attention, mlp, wanted):
    assert from_ratios(layers, attention, mlp) == wanted


@pytest.mark.parametrize("shares", [(0.7, 0.4), (-0.1, 0), (0, 1.1)])
def test_shares_of_more_than_all(shares):
    with pytest.raises(ValueError):
        from_ratios(10, *shares)
