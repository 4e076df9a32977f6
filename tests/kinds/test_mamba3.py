"""Mamba-3 against its definition, against itself cut otherwise, and against figures of mamba_ssm's own references."""

from __future__ import annotations

import math

import pytest
import recurrent_laws as laws
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.mamba3.module import TURN, Module, turns
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

SMALL = dict(d_model=8, heads=4, head_dim=3, d_state=8, chunk=4)
CASES = {
    "default": SMALL,
    "groups, a norm": dict(SMALL, groups=2, gated_norm="before_gate", rope_fraction=1, chunk=100),
    "three inputs": dict(SMALL, rank=3, groups=2),
    "two inputs, a norm": dict(SMALL, rank=2, gated_norm="before_gate", norm_eps=0.01, chunk=1),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("mamba3", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 2), share=st.integers(1, 2), head_dim=st.integers(1, 4), pairs=st.integers(1, 3),
    rank=st.integers(1, 3), chunk=st.integers(1, 20), length=st.integers(1, 20),
    gated_norm=st.sampled_from(["none", "before_gate"]),
)
def test_is_naive_for_any_fields(length, groups, share, pairs, **fields):
    """With a large eps: the gradient of a short vector's direction is as large as its rounding."""
    fields |= dict(groups=groups, heads=groups * share, d_state=4 * pairs, norm_eps=1)
    laws.is_naive(made(d_model=6, **fields), Tokens.plain(2, length))


@EACH
@BOTH
@laws.CUTS
def test_chunks_are_whole(fields, tokens, cuts):
    laws.chunks_are_whole(made(**fields), tokens, cuts)


@pytest.mark.parametrize("law", [
    laws.documents_are_apart, laws.nothing_leaks, laws.padding_is_nothing, laws.other_document_forgets,
    laws.bf16_is_near,
])
@EACH
def test_laws(fields, law):
    law(made(**fields))


def test_angles_keep_their_digits():
    """After 100,000 tokens as after one: whole turns are dropped on the way."""
    turn = torch.full((1, 100_000, 1, 1), 0.3)
    found, last = turns(turn, chunk=64)
    wanted = torch.arange(1, 100_001, dtype=torch.float64) * turn[0, 0, 0, 0].double()
    apart = (found.flatten().double() - wanted + math.pi) % TURN - math.pi
    assert apart.abs().max() < 2e-3
    assert 0 <= last.item() < TURN


@pytest.mark.parametrize("fill", [-1e4, 1e4])
def test_extreme_inputs_are_finite(fill):
    layer = made(**SMALL)
    x = torch.full((2, 150, 8), fill).requires_grad_()
    y = layer(x, Tokens.packed(torch.arange(150).expand(2, -1) // 37))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def wave(*shape: int, seed: float) -> torch.Tensor:
    """Numbers without a pattern that anybody can make again."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(1.7 * n + 0.1 * n**1.5 + seed).float().view(shape)


#: The last output of the second row: the forward pass of mamba_ssm 2.3.2's Mamba3(8, d_state=8, expand=2, headdim=4),
#: the kernels in it replaced by the step references of its own tests, with waves as weights.
FIGURES = {
    "one input": (dict(), [130.96733, -53.69711, 86.14453, 98.79856, -133.09592, 59.88621, 103.59249, -108.53925]),
    "groups, all turns": (
        dict(groups=2, rope_fraction=1),
        [64.27464, -133.90784, 72.03133, 10.88096, -49.63285, 1.9173, 44.54369, -28.24455],
    ),
    "a norm": (
        dict(gated_norm="before_gate"),
        [10.14789, 7.68247, -0.02398, 6.73357, -0.81024, 17.99207, 4.38794, -12.14321],
    ),
    "three inputs": (
        dict(rank=3, groups=2),
        [23.78273, -31.7986, 15.51337, 24.17572, -18.97539, 60.42713, 23.60973, -40.57819],
    ),
    "two inputs, a norm": (
        dict(rank=2, gated_norm="before_gate"),
        [1.07105, 2.90072, 0.18734, 2.38967, -2.84609, 2.54799, 2.42243, -3.17223],
    ),
}


@pytest.mark.parametrize("fields, wanted", FIGURES.values(), ids=FIGURES)
def test_is_mamba_ssm(fields, wanted):
    layer = Module(values("mamba3", d_model=8, heads=4, head_dim=4, d_state=8, chunk=4, **fields), Dims(8, 8))
    layer.load_state_dict({name: wave(*t.shape, seed=len(name)) for name, t in layer.state_dict().items()})
    y = layer(2 * wave(2, 7, 8, seed=0.5), Tokens.plain(2, 7))
    torch.testing.assert_close(y[1, -1], torch.tensor(wanted), rtol=1e-5, atol=2e-5)
