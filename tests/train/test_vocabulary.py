"""The loss and the lookup over parts of a vocabulary, on threads that stand for ranks, are torch's over the whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from mambadsl.build.loss import IGNORE, cross_entropy, logits_of
from mambadsl.train import vocabulary
from mambadsl.train.vocabulary import Part

RANKS, ROWS, WIDTH, SIZE = 2, 11, 6, 5
VOCAB = RANKS * SIZE


@pytest.fixture
def ranks():
    """Calls a function on every rank at once: what each gives, in order."""
    _set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()

    def one(function, rank):
        dist.init_process_group("threaded", rank=rank, world_size=RANKS, store=store)
        try:
            part = Part(dist.group.WORLD, first=rank * SIZE, size=SIZE, vocab=VOCAB)
            return function(part, slice(rank * SIZE, (rank + 1) * SIZE))
        except BaseException as error:
            # Wakes those that wait for this one.
            ProcessLocalGroup.exception_handle(error)
            raise
        finally:
            dist.destroy_process_group()

    try:
        with ThreadPoolExecutor(RANKS) as pool:
            yield lambda function: list(pool.map(partial(one, function), range(RANKS)))
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        _set_thread_isolation_mode(False)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("kept", [2**31, 4 * SIZE * 4])
@pytest.mark.parametrize("how", [{}, {"multiplier": 3.0, "softcap": 2.0}], ids=["plain", "capped"])
def test_cross_entropy(monkeypatch, ranks, how, kept):
    """At once, and in chunks that are computed anew in the backward."""
    monkeypatch.setattr(vocabulary, "KEPT_BYTES", kept)
    targets_BT = torch.tensor([[0, 1, 4, 5, 9, IGNORE, 5, 7, 8, 2, IGNORE]])

    def run(part, mine):
        h_BTD, weight_VD = (t.clone().requires_grad_() for t in (drawn(1, ROWS, WIDTH), drawn(VOCAB, WIDTH)[mine]))
        loss = part.loss(h_BTD, weight_VD, targets_BT, **how)
        (2 * loss).backward()
        return loss.detach(), h_BTD.grad, weight_VD.grad

    h_BTD, weight_VD = drawn(1, ROWS, WIDTH).requires_grad_(), drawn(VOCAB, WIDTH).requires_grad_()
    expected = cross_entropy(logits_of(h_BTD, weight_VD, **how), targets_BT)
    (2 * expected).backward()
    losses, dh, dweight = zip(*ranks(run))
    for loss, grad in zip(losses, dh):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, h_BTD.grad)
    torch.testing.assert_close(torch.cat(dweight), weight_VD.grad)


def test_lookup(ranks):
    ids_BT = torch.tensor([[0, 4, 5, 9, 5]])

    def run(part, mine):
        weight_VD = drawn(VOCAB, WIDTH)[mine].requires_grad_()
        x_BTD = part.look_up(ids_BT, weight_VD)
        (x_BTD * x_BTD).sum().backward()
        return x_BTD.detach(), weight_VD.grad

    weight_VD = drawn(VOCAB, WIDTH).requires_grad_()
    expected = F.embedding(ids_BT, weight_VD)
    (expected * expected).sum().backward()
    found, grads = zip(*ranks(run))
    assert all(torch.equal(x_BTD, expected) for x_BTD in found)
    torch.testing.assert_close(torch.cat(grads), weight_VD.grad)


def test_ids_that_no_rank_has(ranks):
    """Every rank finds them, so none waits for another."""

    def run(part, mine):
        targets_BT = torch.tensor([[1, VOCAB]])
        loss = part.loss(drawn(1, 2, WIDTH), drawn(VOCAB, WIDTH)[mine], targets_BT)
        refused = []
        for id in -1, VOCAB:
            with pytest.raises(IndexError):
                part.look_up(torch.tensor([[id]]), drawn(VOCAB, WIDTH)[mine])
            refused.append(id)
        return loss, refused

    for loss, refused in ranks(run):
        assert loss.isnan() and refused == [-1, VOCAB]
