"""Griffin's recurrent block against its definition, against itself cut otherwise, and against Hugging Face's layer."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
import torch.nn.functional as F
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.rg_lru.module import BoundedRoot, Module, decaying_sums
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

SMALL = dict(d_model=8, d_inner=12, blocks=3, chunk=4)
CASES = {
    "default": SMALL,
    "one block, no biases": dict(SMALL, blocks=1, bias=False, conv_bias=False),
    "a block for each channel": dict(SMALL, blocks=12, sharpness=2, chunk=100),
    "no convolution": dict(SMALL, d_conv=1, act="silu"),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("rg_lru", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    blocks=st.integers(1, 3), width=st.integers(1, 4), d_conv=st.integers(1, 5), chunk=st.integers(1, 20),
    length=st.integers(1, 20), bias=st.booleans(), conv_bias=st.booleans(),
)
def test_is_naive_for_any_fields(length, blocks, width, **fields):
    laws.is_naive(made(d_model=6, blocks=blocks, d_inner=blocks * width, **fields), Tokens.plain(2, length))


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


def test_chunk_does_not_matter():
    g = torch.Generator().manual_seed(0)
    u, log_decay = torch.randn(2, 150, 7, generator=g), -F.softplus(torch.randn(2, 150, 7, generator=g))
    segments = torch.arange(150, dtype=torch.int32).expand(2, -1) // 37
    for documents in (None, segments):
        h, last = decaying_sums(u, log_decay, chunk=1, segments_BT=documents)
        for chunk in (2, 7, 64, 1000):
            h_chunk, last_chunk = decaying_sums(u, log_decay, chunk=chunk, segments_BT=documents)
            laws.same(h_chunk, h)
            laws.same(last_chunk, last)


@pytest.mark.parametrize("a_param", [-200.0, -20.0, 60.0, 1e6])
def test_extreme_decays_are_finite(a_param):
    layer = made(**SMALL)
    with torch.no_grad():
        layer.a_param.fill_(a_param)
    x = torch.randn(2, 40, 8, requires_grad=True)
    y = layer(x, Tokens.plain(2, 40))
    y.sum().backward()
    assert y.isfinite().all() and all(t.grad.isfinite().all() for t in (x, *layer.parameters()))


def test_the_root_s_slope_is_bounded():
    x = torch.tensor([0.0, 1e-12, 0.25], requires_grad=True)
    y = BoundedRoot.apply(x)
    y.sum().backward()
    torch.testing.assert_close(y, x.sqrt())
    torch.testing.assert_close(x.grad, torch.tensor([1000.0, 1000.0, 1.0]))


def test_is_hugging_face():
    theirs = layer(
        "RecurrentGemma", "RecurrentGemmaRecurrentBlock", length=83, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=96, num_hidden_layers=3, lru_width=48, head_dim=8,
    )
    w = theirs.weights
    weights = {
        "conv.weight": w["conv_1d.weight"].squeeze(1), "conv.bias": w["conv_1d.bias"],
        "a_param": w["rg_lru.recurrent_param"],
    }
    for kind in ("weight", "bias"):
        weights[f"in_proj.{kind}"] = torch.cat([w[f"linear_{name}.{kind}"] for name in "xy"])
        weights[f"out_proj.{kind}"] = w[f"linear_out.{kind}"]
    for ours, name in ("input_gate", "input_gate"), ("decay_gate", "recurrent_gate"):
        # Theirs multiply rows.
        weights[f"{ours}.weight"] = w[f"rg_lru.{name}_weight"].transpose(1, 2)
        weights[f"{ours}.bias"] = w[f"rg_lru.{name}_bias"].flatten()
    ours = Module(values("rg_lru", d_model=32, d_inner=48, blocks=4), Dims(32, 32))
    ours.load_state_dict(weights)
    y = ours(theirs.x_BTD, Tokens.plain(*theirs.x_BTD.shape[:2]))
    assert (y - theirs.y_BTD).abs().max() <= 5e-5
