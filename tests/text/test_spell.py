"""Suggestions for misspelt words."""

from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from mambadsl.text.spell import edits, nearest, nearest_all, split_layers

LEGAL = ["heads", "kv_heads", "head_dim", "d_state", "d_conv", "window", "rope", "act"]


def test_a_slip_finds_its_word():
    assert nearest("kvheads", LEGAL) == "kv_heads"
    assert nearest("Window", LEGAL) == "window"
    assert nearest("hedas", LEGAL) == "heads"
    assert nearest("n_heads", LEGAL) == "heads"
    assert nearest("widnow", LEGAL) == "window"
    assert nearest("d_sate", LEGAL) == "d_state"


def test_far_words_find_nothing():
    assert nearest("temperature", LEGAL) is None
    assert nearest("q", LEGAL) is None
    assert nearest("", LEGAL) is None
    assert nearest("heads", []) is None
    assert nearest("x", ["_"]) is None
    assert nearest("rope", ["moe", "mlp"]) is None


def test_all_are_ordered_by_distance_and_bounded():
    assert nearest_all("head", LEGAL)[0] == "heads"
    assert nearest_all("aaaaa", ["aaabb", "aaaab", "aabbb"]) == ("aaaab", "aaabb")
    assert len(nearest_all("ab", [f"ab{i}" for i in range(9)], most=2)) == 2


def test_split_layers():
    assert split_layers("MMMA", {"M", "A"}) == "M M M A"
    assert split_layers("LocalM", {"Local", "M", "L"}) == "Local M"
    assert split_layers("MX", {"M", "A"}) is None
    assert split_layers("", {"M"}) is None
    assert split_layers("M" * 5000, {"M"}) == " ".join("M" * 5000)


words = st.text("abc_", max_size=7)


@given(words, words)
def test_edits_is_the_textbook_recursion(a, b):
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        best = min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        )
        if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
            best = min(best, distance(i - 2, j - 2) + 1)
        return best

    assert edits(a, b) == distance(len(a), len(b))
    assert edits(b, a) == edits(a, b)


@given(st.lists(st.sampled_from(["M", "A", "Local", "ML"]), min_size=1, max_size=8))
def test_what_split_layers_returns_spells_the_word(layers):
    split = split_layers("".join(layers), {"M", "A", "Local", "ML"})
    assert split.replace(" ", "") == "".join(layers)
    assert len(split.split()) <= len(layers)
