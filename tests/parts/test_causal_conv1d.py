"""The convolution by causal_conv1d equals its definition; the CUDA extension is played by a stand-in."""

from __future__ import annotations

import pytest
import torch
from stand_ins import ConvExtension, conv_results

from mambadsl.kinds.conv import causal_conv

pytest.importorskip("triton")

from mambadsl.parts.causal_conv1d import kernels  # noqa: E402
from mambadsl.parts.causal_conv1d.conv import make_conv  # noqa: E402

B, T, C = 2, 13, 16
SEGMENTS = torch.tensor([[4] * 5 + [5] * 1 + [6] * 7, [2] * 9 + [0] * 2 + [2] * 2], dtype=torch.int32)
LENGTHS = torch.tensor([13, 11])


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    made = ConvExtension()
    monkeypatch.setattr(kernels, "extension", lambda: made)
    return made


def same(conv, inputs, **rows):
    found, truth = (conv_results(f, inputs, before=8, **rows) for f in (conv, causal_conv))
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def case(K=4, bias=True, state=False, width=40, length=T):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, length, width, generator=generator)
    weight = torch.randn(C, K, generator=generator)
    return (
        x, weight, torch.randn(C, generator=generator) if bias else None,
        torch.randn(B, C, K - 1, generator=generator) if state else None,
    )


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_equals_the_definition(K, bias, packed, state):
    inputs = case(K, bias, state)
    rows = dict(segments_BT=SEGMENTS, lengths_B=LENGTHS) if packed else {}
    same(make_conv(), inputs, **rows)


@pytest.mark.parametrize("length", [1, 2])
def test_rows_shorter_than_the_taps(length):
    inputs = case(state=True, length=length)
    same(make_conv(), inputs)


def test_rows_that_the_kernels_cannot_read_are_copied(extension):
    inputs = case(width=37)
    same(make_conv(), inputs)


def test_gradients_go_straight_into_a_wider_buffer():
    x, weight, bias, _ = case()
    wide = torch.full((B, T, 40), 7.0)
    dx, flat, _ = kernels.backward(torch.ones(B, T, C), x[..., 8:24], weight, bias, dx=wide[..., 8:24])
    assert dx.data_ptr() == wide[..., 8:24].data_ptr()
    assert flat.shape == (C * 5,)
    assert (wide[..., :8] == 7).all() and (wide[..., 24:] == 7).all()
    leaf = x.clone().requires_grad_()
    causal_conv(leaf[..., 8:24], weight, bias)[0].sum().backward()
    torch.testing.assert_close(wide[..., 8:24], leaf.grad[..., 8:24])


def test_compiles_whole():
    inputs = case(state=True)
    whole = torch.compile(make_conv(), fullgraph=True, backend="aot_eager")
    for rows in ({}, dict(segments_BT=SEGMENTS, lengths_B=LENGTHS)):
        same(whole, inputs, **rows)


@pytest.mark.parametrize("bias, state", [(True, False), (False, True)])
def test_the_op_keeps_its_promises(bias, state):
    x, weight, bias, before = case(bias=bias, state=state)
    before = None if before is None else before.requires_grad_()
    inputs = (x[..., 8:24].requires_grad_(), weight.requires_grad_(), bias, None, before, "mamba_ssm")
    torch.library.opcheck(torch.ops.mambadsl.causal_conv.default, inputs)


@pytest.mark.parametrize("shape, taps, words", [
    ((2, 5, 16), 5, "2 to 4 taps, not 5"),
    ((2, 5, 16), 1, "2 to 4 taps, not 1"),
    ((2, 5, 20), 4, "multiples of 8, not 20"),
    ((2**15, 2**13, 8), 4, "2,147,483,648"),
])
def test_refuses_in_numbers(shape, taps, words):
    x = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match=words):
        kernels.forward(x, torch.empty(shape[-1], taps, device="meta"), None)
