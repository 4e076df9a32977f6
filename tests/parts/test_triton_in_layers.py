"""Layers with our Triton parts equal the same layers without: packed rows, states and gradients, in Triton's
interpreter."""

from __future__ import annotations

import interpreter
import pytest
import torch
from kind_values import module

from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.triton import conv
from mambadsl.parts.triton.conv import make_conv, make_plain_conv
from mambadsl.parts.triton.gate_norm import make_gate_norm

pytestmark = interpreter.ONLY

SEGMENTS = torch.tensor([[0] * 7 + [1] * 3 + [-1], [-1, 0] + [2] * 9], dtype=torch.int32)
#: kind: fields, parts.
LAYERS = {
    "short_conv": (dict(d_conv=3, conv_bias=True), dict(conv=make_plain_conv)),
    "rg_lru": (dict(d_inner=12, blocks=3, chunk=4), dict(conv=make_plain_conv)),
    "gated_delta_net": (
        dict(heads=4, key_heads=2, key_dim=5, value_dim=6, chunk=4), dict(conv=make_conv, gate_norm=make_gate_norm),
    ),
    "kimi_delta": (
        dict(heads=3, key_dim=5, value_dim=6, decay_rank=4, chunk=4),
        dict(conv=make_conv, gate_norm=make_gate_norm),
    ),
    "mamba1": (dict(d_inner=24, d_state=4, chunk=4), dict(conv=make_conv)),
}


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch):
    monkeypatch.setattr(conv, "FORWARD", conv.Walk(32, 4, 4, 1, 12))
    monkeypatch.setattr(conv, "BACKWARD", conv.Walk(32, 4, 4, 1, 12))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_the_reference(kind, packed):
    fields, parts = LAYERS[kind]
    plain, ours = (module(kind, d_model=16, **fields) for _ in range(2))
    ours.parts |= {slot: make() for slot, make in parts.items()}
    tokens = Tokens.packed(SEGMENTS) if packed else Tokens.plain(2, 11)
    real = SEGMENTS >= 0 if packed else torch.ones(2, 11, dtype=torch.bool)
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in plain, ours:
        leaf, state = x.clone().requires_grad_(), layer.init_state(2, dtype=torch.float32)
        y = layer(leaf, tokens, state)[real]
        grads = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        found.append([y.detach(), *grads, *(t for t in state.values() if t.is_floating_point())])
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
