"""The two kinds of RWKV-4 against their definitions, against themselves cut otherwise, and against Hugging Face's
layers."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.registry import get
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

CASES = {
    "wkv4": ("wkv4", dict(d_model=8, d_inner=12, chunk=4)),
    "wkv4, one chunk": ("wkv4", dict(d_model=8, chunk=100)),
    "wkv4, token by token": ("wkv4", dict(d_model=8, chunk=1)),
    "channel_mix": ("channel_mix", dict(d_model=8, d_ff=20)),
}
EACH = pytest.mark.parametrize("kind, fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


@EACH
@BOTH
def test_is_naive(kind, fields, tokens):
    laws.is_naive(module(kind, **fields), tokens)


@settings(max_examples=15, deadline=None)
@given(d_inner=st.integers(1, 9), chunk=st.integers(1, 20), length=st.integers(2, 20))
def test_is_naive_for_any_fields(length, **fields):
    laws.is_naive(module("wkv4", d_model=6, **fields), Tokens.plain(2, length))


@EACH
@BOTH
@laws.CUTS
def test_chunks_are_whole(kind, fields, tokens, cuts):
    laws.chunks_are_whole(module(kind, **fields), tokens, cuts)


@pytest.mark.parametrize("law", [
    laws.documents_are_apart, laws.nothing_leaks, laws.padding_is_nothing, laws.other_document_forgets,
    laws.bf16_is_near,
])
@EACH
def test_laws(kind, fields, law):
    law(module(kind, **fields))


@pytest.mark.parametrize("name", ["time_decay", "time_first"])
@pytest.mark.parametrize("value", [-1e4, -30.0, 30.0, 1e4])
def test_extreme_weights_are_finite(name, value):
    layer = module("wkv4", d_model=8, chunk=16)
    with torch.no_grad():
        layer.get_parameter(name).fill_(value)
    x = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = layer(x, Tokens.packed(torch.arange(150).expand(2, -1) // 37))
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_mean_of_equal_values_is_that_value(size):
    """Whatever the keys are."""
    layer = module("wkv4", d_model=8, chunk=16)
    k = torch.randn(2, 70, 8, generator=torch.Generator().manual_seed(0)) * size
    scan, one = layer.parts["scan"], torch.ones(2, 70, 1)
    y, _ = scan(k, torch.full_like(k, 3), layer.time_decay.exp(), layer.time_first, one, chunk=16)
    torch.testing.assert_close(y, torch.full_like(k, 3))


@pytest.mark.parametrize("length", [1, 5, 150])
@pytest.mark.parametrize("kind, theirs, names", [
    ("wkv4", "RwkvSelfAttention", {
        **{f"mix_{n}": f"time_mix_{name}" for n, name in zip("kvr", ("key", "value", "receptance"))},
        **{f"{n}_proj.weight": f"{name}.weight" for n, name in zip("kvr", ("key", "value", "receptance"))},
        "time_decay": "time_decay", "time_first": "time_first", "out_proj.weight": "output.weight",
    }),
    ("channel_mix", "RwkvFeedForward", {
        "mix_k": "time_mix_key", "mix_r": "time_mix_receptance", "up_proj.weight": "key.weight",
        "r_proj.weight": "receptance.weight", "down_proj.weight": "value.weight",
    }),
])
def test_is_hugging_face(kind, theirs, names, length):
    found = layer(
        "Rwkv", theirs, index=1, length=length, attention_hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        rescale_every=0,
    )
    f = values(kind, **({"d_inner": 48} if kind == "wkv4" else {"d_ff": 80}))
    ours = get(kind).module()(f, Dims(32, 32))
    wanted = {name: t.shape for name, t in ours.state_dict().items()}
    ours.load_state_dict({name: found.weights[names[name]].reshape(shape) for name, shape in wanted.items()})
    y = ours(found.x_BTD, Tokens.plain(*found.x_BTD.shape[:2]))
    assert (y - found.y_BTD).abs().max() <= 1e-5
