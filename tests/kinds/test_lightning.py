"""Lightning attention against its definition, against itself cut otherwise, and against Hugging Face's layer."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.lightning.module import Module
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

SMALL = dict(d_model=8, heads=4, head_dim=3, chunk=4)
CASES = {"default": SMALL, "one head": dict(SMALL, heads=1, chunk=100), "token by token": dict(SMALL, chunk=1)}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("lightning", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 4), head_dim=st.integers(1, 5), chunk=st.integers(1, 20), length=st.integers(1, 20))
def test_is_naive_for_any_fields(length, **fields):
    """With a large eps: the gradient of a short vector's direction is as large as its rounding."""
    laws.is_naive(made(d_model=6, norm_eps=0.01, **fields), Tokens.plain(2, length))


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


@pytest.mark.parametrize("slope", [0.0, 1e-30, 1.0, 1e3, 1e38])
def test_extreme_slopes_are_finite(slope):
    layer = made(**SMALL)
    layer.slope.fill_(slope)
    x = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x, Tokens.packed(torch.arange(150).expand(2, -1) // 37))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("length", [5, 21])
def test_is_hugging_face(length):
    theirs = layer(
        "MiniMax", "MiniMaxLightningAttention", index=1, length=length, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, intermediate_size=8, num_hidden_layers=3, num_local_experts=2, block_size=8,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    )
    weights = theirs.weights
    qkv = weights["qkv_proj.weight"].unflatten(0, (4, 3, 6)).unbind(1)
    ours = Module(values("lightning", d_model=32, heads=4, head_dim=6), Dims(32, 32))
    ours.load_state_dict({
        "in_proj.weight": torch.cat([*(t.flatten(0, 1) for t in qkv), weights["output_gate.weight"]]),
        "slope": weights["slope_rate"].flatten(), "gate_norm.weight": weights["norm.weight"],
        "out_proj.weight": weights["out_proj.weight"],
    })
    y = ours(theirs.x_BTD, Tokens.plain(*theirs.x_BTD.shape[:2]))
    assert (y - theirs.y_BTD).abs().max() <= 1e-5
