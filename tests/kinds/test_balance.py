"""Losses that balance experts against Hugging Face's and their definitions; loads, told once whatever is done again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambadsl.kinds.balance import FIGURES, bias_step
from mambadsl.kinds.fields import Word
from mambadsl.kinds.moe.kind import ROUTER
from mambadsl.kinds.moe.module import route
from mambadsl.kinds.tokens import PADDING, Tokens
from mambadsl.kinds.values import Variant

#: A row without padding, one with documents and padding, one that is padding alone.
SEGMENTS = torch.tensor([[0] * 9, [0, 0, 0, 1, 1, 1, 1, PADDING, PADDING], [PADDING] * 9], dtype=torch.int32)


def router(name: str, **changed) -> Variant:
    return Variant(name, ROUTER.convert(Word(name)).values.replace(**changed))


ROUTERS = {
    "softmax": router("softmax"),
    "Granite's": router("softmax", order="after_top_k"),
    "sigmoid": router("sigmoid", renorm=False),
    "groups": router("sigmoid", groups=3, top_groups=2),
    "mlp": router("mlp", d_router=5, skip=False),
    "mlp that may skip": router("mlp", d_router=5),
}


def made(form, **fields):
    layer = module("moe", d_model=16, d_ff=8, experts=6, top_k=2, router=form, **fields)
    layer.watch(row_share=0.25, device=torch.device("cpu"))
    return layer


def told(layer) -> tuple[list[float], dict[str, float]]:
    loads_E, figures = layer.told.grad.split((6, len(FIGURES)))
    return loads_E.tolist(), dict(zip(FIGURES, figures.tolist()))


def of_losses_alone(layer, x: Tensor, tokens: Tokens, *wanted: Tensor) -> list[Tensor]:
    """What the losses add to the gradients of these."""
    y = layer(x, tokens)
    y = y[0] if layer.gives else y
    layer.told.grad, *found = torch.autograd.grad((y * 0).sum(), [layer.told, *wanted], retain_graph=True)
    return found


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 9, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("order", ["before_top_k", "after_top_k"])
def test_as_hugging_faces(order):
    """Theirs is of all rows together, ours of each, and theirs is top_k where all is even."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer, x = made(router("softmax", order=order), aux_loss=0.3), inputs()
    mine = of_losses_alone(layer, x, Tokens.packed(SEGMENTS), x, layer.router.weight)
    theirs = torch.zeros(())
    for x_TD, segments_T in zip(x[:2], SEGMENTS):
        logits = (x_TD @ layer.router.weight.T,)
        theirs = theirs + load_balancing_loss_func(logits, 6, 2, (segments_T >= 0)[None]) / 2
    truth = torch.autograd.grad(0.3 * 0.25 * theirs, [x, layer.router.weight])
    torch.testing.assert_close(mine, list(truth), rtol=1e-4, atol=1e-7)
    assert told(layer)[1] == pytest.approx({"rows": 3, "aux": theirs.item(), "z": 0}, rel=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_by_definition(name):
    layer, x = made(ROUTERS[name], aux_loss=0.3, z_loss=0.2), inputs()
    form, seen = layer.f.router, []
    layer.parts["router"] = lambda *args, **how: seen.append((args[0], route(*args, **how))) or seen[0][1]
    tokens = Tokens.packed(SEGMENTS)
    mine = of_losses_alone(layer, x, tokens, x, layer.router.weight)
    [(read_ND, (index_NK, weight_NK))] = seen
    aux, z, loads = torch.zeros(()), torch.zeros(()), [0.0] * 6
    for row, segments in enumerate(SEGMENTS.tolist()):
        chosen, scores = [], []
        for t, segment in enumerate(segments):
            if segment == PADDING:
                continue
            logits = layer.router.weight @ read_ND[9 * row + t]
            z = z + logits.exp().sum().log() ** 2 / sum(s >= 0 for s in segments)
            s = logits.sigmoid() if form.name == "sigmoid" else logits.exp()
            scores.append(s / s.sum())
            found = zip(index_NK[9 * row + t].tolist(), weight_NK[9 * row + t].tolist())
            chosen += [expert for expert, weight in found if weight]
        for expert in range(6 if chosen else 0):
            mean = sum(s[expert] for s in scores) / len(scores)
            aux = aux + 6 * chosen.count(expert) / len(chosen) * mean
            loads[expert] += chosen.count(expert)
    truth = torch.autograd.grad(0.25 * (0.3 * aux + 0.2 * z), [x, layer.router.weight])
    torch.testing.assert_close(mine, list(truth), rtol=1e-4, atol=1e-6)
    assert told(layer) == (loads, pytest.approx({"rows": 3, "aux": aux.item(), "z": z.item()}, rel=1e-5))
    assert form.values.get("skip") or sum(loads) == 2 * 16


def test_even_experts_are_1_and_one_with_everything_is_all_of_them():
    layer, x = made(router("softmax"), aux_loss=1.0), inputs(2).detach()
    with torch.no_grad():
        layer.router.weight.zero_()
    of_losses_alone(layer, x, Tokens.plain(2, 9), layer.router.weight)
    assert told(layer)[1]["aux"] == pytest.approx(2)
    alone = module("moe", d_model=16, d_ff=8, experts=6, top_k=1, aux_loss=1.0)
    alone.watch(row_share=1, device=torch.device("cpu"))
    with torch.no_grad():
        alone.router.weight[0] = 1e3
    of_losses_alone(alone, x.abs(), Tokens.plain(2, 9), alone.router.weight)
    assert told(alone)[1]["aux"] == pytest.approx(12)
    assert told(alone)[0] == [18, 0, 0, 0, 0, 0]


def test_rows_in_parts_and_recomputed_tell_the_same():
    """One pass, row by row, and with the forward pass done twice: the same gradients, told once."""
    found = []
    for way in "whole", "rows", "recomputed":
        layer, x = made(router("sigmoid"), aux_loss=0.3, z_loss=0.2), inputs()
        for rows in [slice(0, 3)] if way != "rows" else [slice(0, 1), slice(1, 2), slice(2, 3)]:
            run = (lambda *args: checkpoint(layer, *args, use_reentrant=False)) if way == "recomputed" else layer
            run(x[rows], Tokens.packed(SEGMENTS[rows])).square().sum().backward()
        found.append([layer.told.grad, x.grad, *(p.grad for p in layer.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0][0][:6], found[1][0][:6]) and torch.equal(found[0][0], found[2][0])


@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(["sigmoid", "groups", "mlp"]))
@settings(max_examples=12, deadline=None)
def test_a_bias_evens_any_router(seed, name):
    """Choices of 512 tokens among 6 experts that some are far better liked of: even, but for the last steps' size."""
    draw = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(512, 6, generator=draw) + torch.randn(6, generator=draw)
    bias_E, worst = torch.zeros(6), []
    for step in range(400):
        index_NK, _ = route(logits_NE, torch.eye(6), bias_E, router=ROUTERS[name], top_k=2)
        loads_E = torch.bincount(index_NK.flatten(), minlength=6)
        bias_E += bias_step(loads_E, rate=0.01 if step < 300 else 0.001)
        worst.append(loads_E.max().item() * 6 / 1024)
    assert worst[-1] < 1.1 and worst[-1] <= worst[0]
    assert torch.equal(bias_step(torch.full((6,), 7), rate=1.0), torch.zeros(6))


def test_nobody_is_told_where_nobody_asks():
    """The layer is what it was: coefficients change nothing but a training step."""
    x = inputs()
    plain = module("moe", d_model=16, d_ff=8, experts=6, top_k=2)
    balanced = module("moe", d_model=16, d_ff=8, experts=6, top_k=2, aux_loss=0.3, z_loss=0.2)
    results, gradients = [], []
    for layer in plain, balanced:
        results.append(layer(x, Tokens.plain(3, 9)))
        gradients += torch.autograd.grad(results[-1].square().sum(), layer.router.weight)
    assert torch.equal(*results) and torch.equal(*gradients)
    balanced.watch(row_share=1, device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(balanced(x, Tokens.plain(3, 9)), results[0])


def test_through_torch_compile():
    """With the part that runs there: the host counts nothing."""
    from mambadsl.kinds.registry import get
    from mambadsl.parts.torch.experts import grouped_experts

    given = module("moe", d_model=16, d_ff=8, experts=6, top_k=2, router=router("sigmoid"), aux_loss=0.3, z_loss=0.2)
    found = []
    for compiled in False, True:
        layer = get("moe").module()(given.f, given.dims, dtype=torch.bfloat16, parts={"experts": grouped_experts})
        layer.load_state_dict(given.state_dict())
        layer.watch(row_share=0.25, device=torch.device("cpu"))
        run = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else layer
        for _ in range(2):
            run(inputs().bfloat16(), Tokens.packed(SEGMENTS)).float().square().sum().backward()
        found.append([layer.told.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*found)
    assert found[0][0][:6].sum() == 2 * 2 * 16
