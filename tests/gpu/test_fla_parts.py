"""flash-linear-attention's convolution on a GPU against the reference."""

from __future__ import annotations

import pytest
import torch
from on_gpu import NEEDS_GPU, error, replayed

pytest.importorskip("fla", reason="needs flash-linear-attention")
pytestmark = NEEDS_GPU

from mambadsl.kinds.conv import causal_conv  # noqa: E402
from mambadsl.parts.fla.conv import make_conv  # noqa: E402

T, C = 300, 96


def case(*, dtype=torch.bfloat16, bias: bool = True, taps: int = 4, seed: int = 0):
    g = torch.Generator("cuda").manual_seed(seed)
    # Channels are a slice of the projection's, as in the layer.
    wide = torch.randn(2, T, C + 40, generator=g, device="cuda").to(dtype)
    weights = [torch.randn(C, taps, generator=g, device="cuda"), torch.randn(C, generator=g, device="cuda")]
    weights = [w.to(dtype).requires_grad_() for w in weights]
    return [wide[..., 8 : C + 8].requires_grad_(), weights[0], weights[1] if bias else None]


def results(function, x, weight, bias):
    y, last = function(x, weight, bias)
    assert last is None
    weigh = torch.linspace(-1, 1, C, device="cuda")
    return [y, *torch.autograd.grad((y.float() * weigh).sum(), [t for t in (x, weight, bias) if t is not None])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_conv(dtype, bias, taps, compiled):
    given = case(dtype=dtype, bias=bias, taps=taps)
    part = torch.compile(make_conv(), fullgraph=True) if compiled else make_conv()
    for ours, reference in zip(results(part, *given), results(causal_conv, *given), strict=True):
        assert ours.dtype == reference.dtype
        assert error(ours, reference) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_documents_and_states_are_the_reference_s():
    x, weight, bias = case()
    segments = (torch.arange(T, device="cuda") // 77).int().expand(2, T)
    state = torch.randn(2, C, 3, device="cuda")
    for how in dict(segments_BT=segments), dict(state_BCJ=state):
        for ours, reference in zip(make_conv()(x, weight, bias, **how), causal_conv(x, weight, bias, **how)):
            assert ours is reference or torch.equal(ours, reference)


def test_in_a_cuda_graph():
    given, other = case(), [t.detach() for t in case(seed=1)]

    def run(*tensors):
        return results(make_conv(), *tensors)

    expected = [t.clone() for t in run(*(t.clone().requires_grad_() for t in other))]
    for ours, eager in zip(replayed(run, given, other), expected, strict=True):
        assert error(ours, eager) < 1e-3
