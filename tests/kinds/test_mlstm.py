"""mLSTM against its definition, against itself cut otherwise, and against Hugging Face's layer."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.mlstm.module import Module
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

SMALL = dict(d_model=8, heads=3, key_dim=4, value_dim=5, chunk=4)
CASES = {
    "default": SMALL, "one head": dict(SMALL, heads=1, chunk=100), "token by token": dict(SMALL, chunk=1),
    "no cap": dict(SMALL, gate_softcap=None), "large eps": dict(SMALL, divisor_eps=0.5, norm_eps=1e-3),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("mlstm", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 4), key_dim=st.integers(1, 5), value_dim=st.integers(1, 5), chunk=st.integers(1, 20),
    length=st.integers(1, 20),
)
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


@pytest.mark.parametrize("cap", [None, 15])
@pytest.mark.parametrize("gate", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("bias", ["input_bias", "forget_bias"])
def test_extreme_gates_are_finite(bias, gate, cap):
    layer = made(**SMALL, gate_softcap=cap)
    with torch.no_grad():
        layer.get_parameter(bias).fill_(gate)
    x = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x, Tokens.packed(torch.arange(150).expand(2, -1) // 37))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("length", [1, 5, 21, 150])
def test_is_hugging_face(length):
    theirs = layer(
        "xLSTM", "xLSTMLayer", length=length, hidden_size=64, num_heads=4, qk_dim_factor=1.0, v_dim_factor=2.0,
        chunk_size=8, num_hidden_layers=2,
    )
    w = theirs.weights
    ours = Module(values("mlstm", d_model=64, heads=4, key_dim=16, value_dim=32), Dims(64, 64))
    names = "q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact"
    ours.load_state_dict({
        "in_proj.weight": torch.cat([w[f"{name}.weight"] for name in names]),
        "input_bias": w["igate_preact.bias"], "forget_bias": w["fgate_preact.bias"],
        "head_norm.weight": w["multihead_norm.weight"], "out_proj.weight": w["out_proj.weight"],
    })
    y = ours(theirs.x_BTD, Tokens.plain(*theirs.x_BTD.shape[:2]))
    assert (y - theirs.y_BTD).abs().max() <= 5e-5
