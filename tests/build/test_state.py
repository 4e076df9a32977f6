"""Positions and documents against counting by hand, whole and in chunks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambadsl.build.state import DecodingState, describe

PAD = -1


def counted(row: list[int]) -> list[int | None]:
    """Place of each token among its document's; None for padding."""
    seen: dict[int, int] = {}
    places: list[int | None] = []
    for document in row:
        places.append(None if document == PAD else seen.get(document, 0))
        seen[document] = seen.get(document, 0) + 1
    return places


@st.composite
def rows(draw) -> list[list[int]]:
    """Two rows of ascending document numbers with padding anywhere."""
    length = draw(st.integers(1, 10))
    found = []
    for _ in range(2):
        documents = sorted(draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
        holes = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        found.append([PAD if hole else d for d, hole in zip(documents, holes)])
    return found


@settings(max_examples=150, deadline=None)
@given(rows=rows(), cuts=st.lists(st.integers(1, 9), max_size=3, unique=True).map(sorted))
def test_positions_are_counted_in_each_document(rows, cuts):
    segments, length = torch.tensor(rows), len(rows[0])
    edges = [0, *(c for c in cuts if c < length), length]
    state = DecodingState({}, torch.zeros(2, dtype=torch.int64))
    found = []
    for a, b in zip(edges, edges[1:]):
        tokens = describe((2, b - a), segments=segments[:, a:b], state=state)
        state.advance(tokens)
        found.append(tokens)
    positions = torch.cat([t.positions_BT for t in found], 1).tolist()
    assert torch.equal(torch.cat([t.segments_BT for t in found], 1), segments.int())
    for row, places in zip(rows, positions):
        assert [p if d != PAD else None for d, p in zip(row, places)] == counted(row)
        assert min(places) >= 0
    for row, place, document in zip(rows, state.position_B.tolist(), state.segment_B.tolist()):
        real = [d for d in row if d != PAD]
        assert place == (real.count(real[-1]) if real else 0) and document == (real[-1] if real else 0)


def test_plain_rows_need_no_segments():
    state = DecodingState({}, torch.tensor([3, 5]))
    tokens = describe((2, 2), state=state)
    assert tokens.segments_BT is None and tokens.positions_BT.tolist() == [[3, 4], [5, 6]]
    state.advance(tokens)
    assert state.position_B.tolist() == [5, 7] and state.segment_B is None


def test_a_mask_and_segments_together():
    segments = torch.tensor([[0, 0, 1, 1]])
    tokens = describe((1, 4), segments=segments, valid=torch.tensor([[False, True, True, False]]))
    assert tokens.segments_BT.tolist() == [[-1, 0, 1, -1]]
    assert tokens.positions_BT.tolist()[0][1:3] == [0, 0]


def test_given_positions_are_kept():
    tokens = describe((2, 3), positions=torch.tensor([7, 8, 9]))
    assert tokens.positions_BT.tolist() == [[7, 8, 9]] * 2


def test_documents_can_be_traced():
    """torch.compile takes it whole: the look at the data is left out there."""
    segments = torch.tensor([[0, 0, 1, 1], [2, 3, 3, -1]])

    def positions(segments):
        return describe((2, 4), segments=segments).positions_BT

    whole = torch.compile(positions, fullgraph=True, backend="eager")
    assert torch.equal(whole(segments), positions(segments))
