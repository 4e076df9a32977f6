"""Compressed convolutional attention against Hugging Face's layer, its definition, and what a document begins with."""

from __future__ import annotations

import pytest
import torch
from hf_layers import layer
from kind_values import module
from ragged import REAL, part_of, ragged

from mambadsl.kinds.attention.kind import ROPE
from mambadsl.kinds.cca.naive import naive
from mambadsl.kinds.fields import Call
from mambadsl.kinds.state import Room
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Variant

SMALL = dict(d_model=32, heads=4, kv_heads=2, head_dim=16)
THEIRS = dict(
    num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, head_dim=16, moe_intermediate_size=24,
    num_experts=4, router_hidden_size=16,
)


def rope(theta: float) -> Variant:
    form = ROPE.convert(Call("rope", {}))
    return Variant("rope", form.values.replace(theta=theta, fraction=0.5))


FULL, SLIDING = dict(rope=rope(5_000_000)), dict(rope=rope(10_000), window=5)
#: name: (settings there, our fields)
CASES = {
    "published": ({}, FULL),
    "windows": (dict(layer_types=["hybrid_sliding"], sliding_window=5), SLIDING),
    "biases": (dict(attention_bias=True), dict(bias=True, **FULL)),
    "many taps": (dict(cca_time0=4, cca_time1=3), dict(d_conv=4, d_head_conv=3, **FULL)),
    "one tap": (dict(cca_time0=1, cca_time1=1), dict(d_conv=1, d_head_conv=1, **FULL)),
    "one head of keys": (dict(num_key_value_heads=1), dict(kv_heads=1, **FULL)),
    "heads of their own": (dict(num_key_value_heads=4), dict(kv_heads=4, **FULL)),
}
EACH = pytest.mark.parametrize("name", CASES)


def renamed(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    at = "qkv_proj"
    ours = {"temperature": theirs["qk_norm.temp"]}
    for w in "weight", "bias":
        parts = [f"{at}.{name}.{w}" for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")]
        if parts[0] in theirs:
            ours |= {f"{at}.{w}": torch.cat([theirs[part] for part in parts]), f"o_proj.{w}": theirs[f"o_proj.{w}"]}
        convs = {"conv": "conv_qk_depthwise", "head_conv": "conv_qk_grouped"}
        ours |= {f"{our}.{w}": theirs[f"{at}.{their}.{w}"] for our, their in convs.items()}
    grouped = ours["head_conv.weight"]
    return ours | {
        "conv.weight": ours["conv.weight"].squeeze(1), "head_conv.weight": grouped.unflatten(0, (-1, grouped.shape[1])),
    }


@EACH
def test_equals_hugging_face(name):
    config, fields = CASES[name]
    theirs = layer("Zaya", "ZayaAttention", **{**THEIRS, **config})
    ours = module("cca", **{**SMALL, **fields})
    ours.load_state_dict(renamed(theirs.weights), strict=True)
    y = ours(theirs.x_BTD, Tokens.plain(2, 12))
    torch.testing.assert_close(y, theirs.y_BTD, rtol=0, atol=5e-5)
    assert theirs.y_BTD.abs().max() > 0.1


@EACH
def test_every_document_begins_as_the_first_does(name):
    """Documents and padding, whole, in chunks and token by token, against the definition."""
    ours = module("cca", **{**SMALL, **CASES[name][1]})
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(1))
    wanted, _ = naive(ours.state_dict(), ours.f, ours.dims, x, ragged())
    for cuts in [10], [3, 2, 5], [1] * 10:
        state, parts, at = ours.init_state(4, dtype=torch.float32), [], 0
        for count in cuts:
            parts.append(ours(x[:, at : at + count], part_of(ragged(), at, at + count), state))
            at += count
        torch.testing.assert_close(torch.cat(parts, 1)[REAL], wanted[REAL], rtol=0, atol=1e-5)


@EACH
def test_in_place(name):
    """Fixed memory: prompts padded on the left, then token by token."""
    ours = module("cca", **{**SMALL, **CASES[name][1]})
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    room = Room(8)
    state = ours.init_state(2, dtype=torch.float32, room=room)
    held = {key: tensor.data_ptr() for key, tensor in state.items()}
    ours(x[:, :5], Tokens.padded(valid), state)
    steps = []
    for i in range(5, 8):
        room.used = i
        steps.append(ours(x[:, i : i + 1], Tokens(torch.tensor([[i], [i - 2]])), state))
    assert {key: tensor.data_ptr() for key, tensor in state.items()} == held
    alone = [ours(x[:1], Tokens.plain(1, 8)), ours(x[1:, 2:], Tokens.plain(1, 6))]
    torch.testing.assert_close(torch.cat(steps, 1), torch.cat([y[:, -3:] for y in alone]), rtol=0, atol=1e-5)


def test_keys_without_a_temperature_give_the_mean():
    ours = module("cca", **SMALL)
    with torch.no_grad():
        ours.temperature.zero_()
    x = torch.randn(1, 6, 32)
    tokens = Tokens.plain(1, 6)
    seen = []
    ours.parts["core"] = lambda q, k, v, *rest, **how: seen.append((q, k, v)) or q
    ours(x, tokens)
    (q, k, v), = seen
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 6, 4), 4.0))
    assert not k.any()
    # Half of the values is the previous token's, and nothing before the first.
    flat = v.flatten(2)
    next_ = (x @ ours.qkv_proj.weight.T)[..., -16:]
    torch.testing.assert_close(flat[:, 1:, 16:], next_[:, :-1])
    assert not flat[:, 0, 16:].any()
