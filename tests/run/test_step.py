"""The training step: what it leaves in `grad`, how often it compiles, and what a CUDA graph of it computes."""

from __future__ import annotations

import pytest
import torch
from small_models import EVERYTHING, VOCAB, ids, made
from torch._dynamo.testing import CompileCounterWithBackend

from mambadsl.run.step import TrainStep, aliases_of, loss_and_gradients

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MIX = "[M F]*5 A F A"


def _by_backward(model, **batch):
    """The loss and gradients as a user's own loop has them."""
    model.zero_grad()
    loss = model.loss(**batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), grads


def _assert_equal(model, loss, expected, **tolerance):
    torch.testing.assert_close(loss, expected[0], **tolerance)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[1][name], msg=lambda m: f"{name}: {m}", **tolerance)


def test_a_step_is_forward_and_backward_and_overwrites():
    model = made(EVERYTHING).train()
    first, second = ids(2, 9, seed=1), ids(3, 7, seed=2)
    expected = _by_backward(model, tokens_BT=second)
    step = TrainStep(model)
    step.step(first)
    loss = step.step(second)
    assert loss.dtype == torch.float32 and loss.shape == () and not loss.requires_grad
    _assert_equal(model, loss, expected)


def test_targets_segments_and_padding_are_passed_on():
    model = made(MIX).train()
    batch = dict(
        tokens_BT=ids(2, 8), targets_BT=ids(2, 8, seed=5),
        segments=torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0] * 8]), valid=torch.arange(16).view(2, 8) < 13,
    )
    expected = _by_backward(model, **batch)
    tokens, targets = batch.pop("tokens_BT"), batch.pop("targets_BT")
    _assert_equal(model, TrainStep(model).step(tokens, targets, **batch), expected)


@pytest.mark.parametrize("stack, different", [
    ("M*24", 1), (MIX, 3), ("[C F]*4 M", 3), ("Lends [Borrows F]*3 Lends Borrows", 3), ("Giver Memory F Memory", 3),
])
def test_layers_alike_compile_once(stack, different):
    """`C` is recomputed in the backward pass; everything compiles whole, so a break would raise."""
    model = made(stack).train()
    tokens = ids(2, 8)
    expected = _by_backward(model, tokens_BT=tokens)
    counter = CompileCounterWithBackend("aot_eager")
    step = TrainStep(model, compile=True, backend=counter)
    for _ in range(3):
        loss = step.step(tokens)
    assert counter.frame_count == different
    _assert_equal(model, loss, expected, atol=1e-5, rtol=1e-4)


def test_more_different_layers_than_the_compiler_allows_by_default():
    stack = " ".join(f"F(d_ff={4 * n})" for n in range(1, torch._dynamo.config.recompile_limit + 4))
    model = made(stack).train()
    before = torch._dynamo.config.recompile_limit
    counter = CompileCounterWithBackend("aot_eager")
    TrainStep(model, compile=True, backend=counter).step(ids(1, 4))
    assert counter.frame_count == len(stack.split())
    assert torch._dynamo.config.recompile_limit == before


def test_a_layer_is_compiled_around_a_part_that_waits():
    """The reference's experts count tokens on the host: nothing is compiled again for other counts."""
    model = made("M E").train()
    counter = CompileCounterWithBackend("aot_eager")
    step = TrainStep(model, compile=True, backend=counter)
    frames = []
    for seed in range(4):
        expected = _by_backward(model, tokens_BT=ids(2, 8, seed=seed))
        _assert_equal(model, step.step(ids(2, 8, seed=seed)), expected, atol=1e-5, rtol=1e-4)
        frames.append(counter.frame_count)
    assert frames[0] > 1 and len(set(frames)) == 1


def test_outside_the_step_nothing_is_compiled():
    model = made(MIX).train()
    counter = CompileCounterWithBackend("aot_eager")
    step = TrainStep(model, compile=True, backend=counter)
    step.step(ids(2, 8))
    compiled = counter.frame_count
    with torch.no_grad():
        model(ids(1, 5), state=model.init_state(1))
    with pytest.raises(ValueError, match="token ids"):
        step.step(torch.full((2, 8), VOCAB))
    assert counter.frame_count == compiled
    assert not any("forward" in vars(sublayer) for _, sublayer in model.sublayers())


@pytest.mark.parametrize("tied", ["true", "false"])
def test_what_a_graph_captures_is_the_step(tied):
    """The function that is captured, run as it is: every kind, shared layers, recomputed ones, a tied head;
    and the model's own parameters neither get gradients nor count in the graph."""
    model = made(EVERYTHING, tie_embeddings=tied).train()
    held = model.loss(ids(1, 4))
    tokens = ids(2, 9)
    expected = _by_backward(model, tokens_BT=tokens)
    loss, grads = loss_and_gradients(model, aliases_of(model), {"tokens_BT": tokens})
    torch.testing.assert_close(loss, expected[0])
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        assert p.grad is None, name
        assert grad.stride() == p.stride(), name
        torch.testing.assert_close(grad, expected[1][name], msg=lambda m: f"{name}: {m}")
    places = [grad.untyped_storage().data_ptr() for grad in grads]
    assert len(set(places)) == len(places)
    assert held.requires_grad


def test_frozen_parameters_get_no_gradient():
    model = made("M F").train()
    model.embed.weight.requires_grad_(False)
    _, grads = loss_and_gradients(model, aliases_of(model), {"tokens_BT": ids(1, 6)})
    assert len(grads) == len(list(model.parameters())) - 1


def test_compiled_sublayers_serve_the_captured_function_too():
    model = made(MIX).train()
    tokens = ids(2, 8)
    counter = CompileCounterWithBackend("aot_eager")
    step = TrainStep(model, compile=True, backend=counter)
    expected = _by_backward(model, tokens_BT=tokens)
    with step._with_compiled():
        for _ in range(3):
            loss, grads = loss_and_gradients(model, aliases_of(model), {"tokens_BT": tokens})
    assert counter.frame_count == 3
    torch.testing.assert_close(loss, expected[0])
    for grad, name in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, expected[1][name], atol=1e-5, rtol=1e-4)


def test_a_graph_needs_cuda():
    with pytest.raises(ValueError, match="CUDA device, and it is on `cpu`"):
        TrainStep(made("M"), graph=True)
