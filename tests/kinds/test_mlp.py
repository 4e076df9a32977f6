"""Feed-forward layers against Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from hf_layers import layer
from kind_values import module

from mambadsl.kinds.mlp.naive import naive
from mambadsl.kinds.registry import get
from mambadsl.kinds.tokens import Tokens

SMALL = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48)
NEMOTRON = dict(
    layers_block_type=["full_attention", "mlp"], num_hidden_layers=None, head_dim=8, mamba_num_heads=4,
)

#: name: (model class, layer class, settings there, our fields)
CASES = {
    "nemotron_h": (
        "NemotronH", "NemotronHMLP",
        NEMOTRON,
        dict(act="relu2"),
    ),
    "nemotron_h, bias": (
        "NemotronH", "NemotronHMLP",
        dict(NEMOTRON, mlp_bias=True),
        dict(act="relu2", bias=True),
    ),
    "llama": ("Llama", "LlamaMLP", {}, dict(act="silu", gated=True)),
    "llama, bias": ("Llama", "LlamaMLP", dict(mlp_bias=True), dict(act="silu", gated=True, bias=True)),
    "gemma": ("Gemma", "GemmaMLP", dict(head_dim=8), dict(act="gelu_tanh", gated=True)),
    "gpt_neox": ("GPTNeoX", "GPTNeoXMLP", dict(hidden_act="gelu"), dict(act="gelu", bias=True)),
    "falcon_h1": (
        "FalconH1", "FalconH1MLP",
        dict(mlp_multipliers=[0.6, 1.0], mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4),
        dict(act="silu", gated=True, gate_multiplier=0.6),
    ),
    "granite": (
        "GraniteMoeHybrid", "GraniteMoeHybridMLP",
        dict(shared_intermediate_size=48, num_local_experts=0, num_experts_per_tok=0, num_hidden_layers=1,
             layer_types=["full_attention"], position_embedding_type=None, mamba_n_heads=4),
        dict(act="silu", gated=True),
    ),
}

#: Names of the two products elsewhere; the gate comes first in a fused one.
UP = {"GPTNeoXMLP": ["dense_h_to_4h"], "GraniteMoeHybridMLP": ["input_linear"], "NemotronHMLP": ["up_proj"]}
DOWN = {"GPTNeoXMLP": "dense_4h_to_h", "GraniteMoeHybridMLP": "output_linear"}


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face(name):
    model, cls, config, fields = CASES[name]
    config = {k: v for k, v in {**SMALL, **config}.items() if v is not None}
    theirs = layer(model, cls, **config)
    ours = module("mlp", d_model=32, d_ff=48, **fields)
    up = "gate_up_proj" if ours.f.gated else "up_proj"
    weights = {}
    for kind in ("weight", "bias") if ours.f.bias else ("weight",):
        ups = [theirs.weights[f"{n}.{kind}"] for n in UP.get(cls, ["gate_proj", "up_proj"])]
        weights[f"{up}.{kind}"] = torch.cat(ups)
        weights[f"down_proj.{kind}"] = theirs.weights[f"{DOWN.get(cls, 'down_proj')}.{kind}"]
    ours.load_state_dict(weights, strict=True)
    y = ours(theirs.x_BTD, Tokens.plain(2, 12))
    torch.testing.assert_close(y, theirs.y_BTD, rtol=0, atol=5e-5)
    assert theirs.y_BTD.abs().max() > 0.1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu2", "relu"])
def test_equals_the_definition_forward_and_backward(act, gated):
    made = module("mlp", d_model=16, d_in=20, d_ff=12, act=act, gated=gated, bias=True, gate_multiplier=0.7)
    x = torch.randn(2, 5, 20, requires_grad=True)
    mix = torch.randn(2, 5, 16)
    weights = dict(made.named_parameters())
    y = made(x, Tokens.plain(2, 5))
    expected, _ = naive(weights, made.f, made.dims, x, Tokens.plain(2, 5))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad((y * mix).sum(), [x, *weights.values()])
    truths = torch.autograd.grad((expected * mix).sum(), [x, *weights.values()])
    for mine, truth in zip(gradients, truths):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32():
    made = module("mlp", d_model=64, act="silu", gated=True)
    narrow = get("mlp").module()(made.f, made.dims, dtype=torch.bfloat16)
    narrow.load_state_dict(made.state_dict())
    x = torch.randn(2, 20, 64)
    truth, y = made(x, Tokens.plain(2, 20)), narrow(x.bfloat16(), Tokens.plain(2, 20))
    assert y.dtype == torch.bfloat16
    assert (y.float() - truth).norm() / truth.norm() < 0.02
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in narrow.parameters())
