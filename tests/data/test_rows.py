"""Rows: no token lost, targets are successors, an order that depends on the sample's number alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mambadsl.build.loss import IGNORE
from mambadsl.data.corpus import Corpus
from mambadsl.data.order import row_of
from mambadsl.data.rows import Rows


def corpus(*lengths: int) -> Corpus:
    """Token n has the id n."""
    ends = np.cumsum(lengths)
    return Corpus(np.arange(ends[-1]), ends)


def order(first: int, stop: int, *, count: int, seed: int) -> list[int]:
    return [row_of(sample, count=count, seed=seed) for sample in range(first, stop)]


CORPORA = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(lambda lengths: corpus(*lengths))


def fields(batch):
    return batch.tokens_BT, batch.targets_BT, batch.segments_BT


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(fields(left), fields(right)))


@given(CORPORA, st.data())
def test_every_token_is_in_one_row_with_its_successor(corpus, data):
    n = len(corpus.tokens)
    rows = Rows(corpus, length=data.draw(st.integers(1, n)), seed=data.draw(st.integers(0, 9)))
    batch = rows.training(rows.count * data.draw(st.integers(0, 3)), rows.count)
    tokens, targets, segments = (field.flatten() for field in fields(batch))
    assert (batch.tokens_BT.dtype, batch.targets_BT.dtype, batch.segments_BT.dtype) == (
        torch.int64, torch.int64, torch.int32
    )
    real = segments >= 0
    assert sorted(tokens[real].tolist()) == list(range(n))
    assert (targets[~real] == IGNORE).all() and (tokens[~real] == 0).all()
    last = set((corpus.ends - 1).tolist())
    for token, target in zip(tokens[real].tolist(), targets[real].tolist()):
        assert target == (IGNORE if token in last else token + 1)


@given(CORPORA, st.data())
def test_segments_are_the_rows_documents(corpus, data):
    rows = Rows(corpus, length=data.draw(st.integers(1, len(corpus.tokens))))
    batch = rows.training(0, rows.count)
    for tokens, segments in zip(batch.tokens_BT, batch.segments_BT):
        real = int((segments >= 0).sum())
        assert (segments[real:] == -1).all()
        documents = np.searchsorted(corpus.ends, tokens[:real].numpy(), side="right")
        assert (documents - documents[0]).tolist() == segments[:real].tolist()


@given(CORPORA, st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 20))
def test_ranks_and_resuming_change_nothing(corpus, seed, ranks, each, done):
    whole = Rows(corpus, length=min(4, len(corpus.tokens)), seed=seed).training(done, ranks * each)
    again = Rows(corpus, length=min(4, len(corpus.tokens)), seed=seed)
    parts = [again.training(done + rank * each, each) for rank in reversed(range(ranks))][::-1]
    for field, *others in zip(fields(whole), *map(fields, parts)):
        assert torch.equal(field, torch.cat(others))


@given(st.integers(1, 400), st.integers(0, 2**64), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(count, seed, epoch):
    assert sorted(order(epoch * count, (epoch + 1) * count, count=count, seed=seed)) == list(range(count))


def test_epochs_and_seeds_differ():
    orders = {tuple(order(e * 50, (e + 1) * 50, count=50, seed=seed)) for e in range(20) for seed in range(20)}
    assert len(orders) == 400


def test_the_order_looks_random():
    """Each place meets each row equally often over many epochs: chi-squared within five deviations of its mean."""
    count, epochs = 10, 4000
    rows = np.array(order(0, count * epochs, count=count, seed=3)).reshape(epochs, count)
    for place in range(count):
        seen = np.bincount(rows[:, place], minlength=count)
        assert ((seen - epochs / count) ** 2 / (epochs / count)).sum() < (count - 1) + 5 * (2 * (count - 1)) ** 0.5
    follows = (rows[:, 1:] == rows[:, :-1] + 1).mean()
    assert abs(follows - 1 / count) < 0.01


def test_the_order_stays_as_it_is():
    """A run that is resumed by a later version goes on with the rows that are left."""
    assert order(0, 12, count=6, seed=7) == [0, 2, 5, 1, 3, 4, 1, 5, 3, 4, 2, 0]


@given(CORPORA, st.floats(0.01, 0.99), st.integers(1, 5))
def test_held_out_rows_are_the_last(corpus, share, length):
    try:
        rows = Rows(corpus, length=length, held_out=share)
    except ValueError:
        return
    assert rows.count >= 1 and rows.held_out_count >= 1
    trained = rows.training(0, rows.count)
    kept = rows.held_out(0, rows.held_out_count)
    seen = [b.tokens_BT[b.segments_BT >= 0].tolist() for b in (trained, kept)]
    assert sorted(seen[0]) + seen[1] == list(range(len(corpus.tokens)))
    halves = [rows.held_out(0, 1), rows.held_out(1, rows.held_out_count - 1)]
    assert torch.equal(kept.tokens_BT, torch.cat([half.tokens_BT for half in halves]))


def test_what_rows_refuse():
    with pytest.raises(ValueError, match="rows of 7 tokens are longer than the corpus, which has 6"):
        Rows(corpus(3, 3), length=7)
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        Rows(corpus(3), length=0)
    with pytest.raises(ValueError, match="from 0 to below 1, not 1.0"):
        Rows(corpus(3), length=2, held_out=1.0)
    with pytest.raises(ValueError, match="leaves no row to train on: the corpus has 6 tokens, 1 row of 6"):
        Rows(corpus(6), length=6, held_out=0.1)
    rows = Rows(corpus(6), length=2)
    with pytest.raises(ValueError, match="0 rows are held out; first = 0, count = 1"):
        rows.held_out(0, 1)
    with pytest.raises(ValueError, match="counted from 0"):
        rows.training(-1, 1)
