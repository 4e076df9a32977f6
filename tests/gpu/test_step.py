"""The training step as a CUDA graph: gradients, optimizers, packed rows, recomputed layers, what it refuses."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCAB, made

from mambadsl.run.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

STACK = "[M F]*2 A C L"


def _tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape or (2, 24), generator=torch.Generator().manual_seed(seed)).cuda()


def _assert_same_grads(a, b):
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("tail", ["", "mtp(depths=2, weights=shared) { M A }"], ids=["", "mtp"])
def test_training_is_the_same_with_and_without(tail, compile):
    """Five steps of two equal models: a graph that missed a weight's update would drift."""
    plain, captured = (made(STACK, device="cuda", more=tail).train() for _ in range(2))
    held = captured.loss(_tokens(0))
    runs = TrainStep(plain), TrainStep(captured, compile=compile, graph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (plain, captured)]
    for seed in range(5):
        losses = [run.step(_tokens(seed)) for run in runs]
        torch.testing.assert_close(losses[1], losses[0], atol=1e-3, rtol=1e-3)
        if seed == 0:
            _assert_same_grads(plain, captured)
        for model, optimizer in zip((plain, captured), optimizers):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=seed % 2 == 0)
    assert held.requires_grad


def test_losses_of_earlier_steps_stay():
    step = TrainStep(made(STACK, device="cuda").train(), graph=True)
    first = step.step(_tokens(1))
    kept = first.item()
    step.step(_tokens(2))
    assert first.item() == kept


def test_packed_rows_and_targets():
    plain, captured = made(STACK, device="cuda").train(), made(STACK, device="cuda").train()
    run = TrainStep(captured, graph=True)
    for cut in (5, 17):
        segments = (torch.arange(24, device="cuda") >= cut).int().expand(2, -1).contiguous()
        there = run.step(_tokens(cut), _tokens(cut + 1), segments=segments)
        here = TrainStep(plain).step(_tokens(cut), _tokens(cut + 1), segments=segments)
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)
        _assert_same_grads(plain, captured)


def test_dropout_differs_from_replay_to_replay():
    run = TrainStep(made("F(dropout=0.5)*3", device="cuda").train(), graph=True)
    tokens = _tokens(3)
    assert len({run.step(tokens).item() for _ in range(4)}) > 1


def test_batches_unlike_the_first_are_refused():
    run = TrainStep(made(STACK, device="cuda").train(), graph=True)
    run.step(_tokens(0))
    with pytest.raises(ValueError, match=r"tokens_BT \[2, 24\] int64, not tokens_BT \[2, 23\]"):
        run.step(_tokens(0, 2, 23))
    with pytest.raises(ValueError, match="targets_BT"):
        run.step(_tokens(0), _tokens(1))


def test_moved_weights_are_noticed_and_close_captures_anew():
    model = made(STACK, device="cuda").train()
    run = TrainStep(model, graph=True)
    before = run.step(_tokens(0))
    model.embed.weight.data = model.embed.weight.data.clone()
    with pytest.raises(RuntimeError, match="moved"):
        run.step(_tokens(0))
    run.close()
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(run.step(_tokens(0)), before)


def test_close_gives_the_memory_back():
    model = made("F(d_ff=4096)*8", device="cuda").train()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    run = TrainStep(model, graph=True)
    run.step(_tokens(0, 8, 512))
    run.close()
    del run
    torch.cuda.empty_cache()
    # The activations are gigabytes; cuBLAS keeps a workspace for the stream.
    assert torch.cuda.memory_reserved() < before + 2**28


def test_recomputed_layers_with_dropout_are_refused():
    with pytest.raises(ValueError, match="stack.1: .*recompute"):
        TrainStep(made("M C(dropout=0.1)", device="cuda"), graph=True)
