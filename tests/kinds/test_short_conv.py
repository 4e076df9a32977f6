"""The gated short convolution against its definition, against itself cut otherwise, and against Hugging Face's."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.short_conv.module import Module
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

CASES = {
    "default": dict(d_model=8),
    "biases": dict(d_model=8, bias=True, conv_bias=True),
    "wider inside": dict(d_model=6, d_inner=11),
    "one tap": dict(d_model=8, d_conv=1),
    "long": dict(d_model=8, d_conv=7),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("short_conv", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    d_inner=st.integers(1, 9), d_conv=st.integers(1, 6), conv_bias=st.booleans(), bias=st.booleans(),
    length=st.integers(1, 20),
)
def test_is_naive_for_any_fields(length, **fields):
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [3, 7])
def test_is_hugging_face(bias, taps):
    theirs = layer(
        "Lfm2", "Lfm2ShortConv", length=21, layer_types=["conv"], num_hidden_layers=1, conv_L_cache=taps,
        conv_bias=bias, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    )
    weights = {n: t.squeeze(1) if t.dim() == 3 else t for n, t in theirs.weights.items()}
    ours = Module(values("short_conv", d_model=32, d_conv=taps, bias=bias, conv_bias=bias), Dims(32, 32))
    ours.load_state_dict(weights)
    y = ours(theirs.x_BTD, Tokens.plain(*theirs.x_BTD.shape[:2]))
    assert (y - theirs.y_BTD).abs().max() <= 5e-5
