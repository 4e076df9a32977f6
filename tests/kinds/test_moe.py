"""Mixtures of experts against Hugging Face's, and routing rules one by one."""

from __future__ import annotations

import re

import pytest
import torch
from hf_layers import layer
from kind_values import module
from torch import Tensor

from mambadsl.kinds.fields import Word
from mambadsl.kinds.moe.kind import ROUTER
from mambadsl.kinds.moe.module import route
from mambadsl.kinds.moe.naive import naive
from mambadsl.kinds.registry import get
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Variant

SMALL = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=24)
SWIGLU = dict(d_ff=24, act="silu", gated=True)


def router(name: str, **changed) -> Variant:
    return Variant(name, ROUTER.convert(Word(name)).values.replace(**changed))


NEMOTRON = dict(
    layers_block_type=["full_attention", "moe"], num_hidden_layers=None, head_dim=8, mamba_num_heads=4,
    n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=40, routed_scaling_factor=2.5, norm_topk_prob=True,
)
QWEN = dict(
    moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=6, num_experts_per_tok=3,
    decoder_sparse_step=1,
)
DEEPSEEK = dict(
    moe_intermediate_size=24, num_local_experts=16, num_experts_per_tok=4, n_shared_experts=2,
    first_k_dense_replace=0, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, routed_scaling_factor=1.7,
)

#: name: (model class, layer class, settings there, our fields)
CASES = {
    "jamba": (
        "Jamba", "JambaSparseMoeBlock",
        dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
             num_experts=5, num_experts_per_tok=2, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=2),
        dict(experts=5, top_k=2, **SWIGLU),
    ),
    "mixtral": (
        "Mixtral", "MixtralSparseMoeBlock", dict(num_local_experts=6, num_experts_per_tok=2),
        dict(experts=6, top_k=2, router=router("softmax", renorm=True), **SWIGLU),
    ),
    "qwen2_moe": (
        "Qwen2Moe", "Qwen2MoeSparseMoeBlock", dict(QWEN, norm_topk_prob=False),
        dict(experts=6, top_k=3, shared_d_ff=40, shared_gate="sigmoid", **SWIGLU),
    ),
    "qwen2_moe, renormalised": (
        "Qwen2Moe", "Qwen2MoeSparseMoeBlock", dict(QWEN, norm_topk_prob=True),
        dict(experts=6, top_k=3, shared_d_ff=40, shared_gate="sigmoid", router=router("softmax", renorm=True),
             **SWIGLU),
    ),
    "nemotron_h": (
        "NemotronH", "NemotronHMoE", dict(NEMOTRON, n_group=1, topk_group=1),
        dict(experts=8, top_k=3, d_ff=24, act="relu2", shared_d_ff=40, router=router("sigmoid", scale=2.5)),
    ),
    "nemotron_h, groups and latent": (
        "NemotronH", "NemotronHMoE", dict(NEMOTRON, n_group=4, topk_group=2, moe_latent_size=12),
        dict(experts=8, top_k=3, d_ff=24, act="relu2", shared_d_ff=40, latent=12,
             router=router("sigmoid", scale=2.5, groups=4, top_groups=2)),
    ),
    "zaya": (
        "Zaya", "ZayaSparseMoeBlock",
        dict(head_dim=16, moe_intermediate_size=24, num_experts=5, router_hidden_size=12),
        dict(experts=5, top_k=1, router=router("mlp", d_router=12, carry="first"), **SWIGLU),
    ),
    "deepseek_v3": (
        "DeepseekV3", "DeepseekV3MoE", dict(DEEPSEEK, n_group=4, topk_group=2, norm_topk_prob=True),
        dict(experts=16, top_k=4, shared_d_ff=48, router=router("sigmoid", scale=1.7, groups=4, top_groups=2),
             **SWIGLU),
    ),
    "deepseek_v3, as scored": (
        "DeepseekV3", "DeepseekV3MoE", dict(DEEPSEEK, n_group=2, topk_group=1, norm_topk_prob=False),
        dict(experts=16, top_k=4, shared_d_ff=48,
             router=router("sigmoid", scale=1.7, groups=2, top_groups=1, renorm=False), **SWIGLU),
    ),
}

#: Names there -> here.
NAMES = {
    "gate.weight": "router.weight", "gate.e_score_correction_bias": "router.bias",
    "fc1_latent_proj.weight": "latent_in_proj.weight", "fc2_latent_proj.weight": "latent_out_proj.weight",
    "shared_expert_gate.weight": "shared_gate.weight",
    **{f"gate.down_proj.{w}": f"router.enter.{w}" for w in ("weight", "bias")},
    **{f"gate.router_mlp.{fc}.{w}": f"router.{fc}.{w}" for fc in ("fc1", "fc2") for w in ("weight", "bias")},
    "gate.router_mlp.norm.weight": "router.norm.weight", "gate.router_mlp.out_proj.weight": "router.weight",
    "gate.balancing_biases": "router.bias", "gate.router_states_scale": "router.carry_scale",
}


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names; the gate of a shared expert joined to its up projection."""
    ours, gate = {}, None
    for name, tensor in theirs.items():
        name = re.sub(r"^shared_experts?\.", "shared.", NAMES.get(name, name))
        if name == "shared.gate_proj.weight":
            gate = tensor
        else:
            ours[name] = tensor
    if gate is not None:
        ours["shared.gate_up_proj.weight"] = torch.cat((gate, ours.pop("shared.up_proj.weight")))
    return ours


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face(name):
    model, cls, config, fields = CASES[name]
    config = {k: v for k, v in {**SMALL, **config}.items() if v is not None or k == "q_lora_rank"}
    theirs = layer(model, cls, **config)
    ours = module("moe", d_model=32, **fields)
    ours.load_state_dict(renamed(theirs.weights), strict=True)
    y = ours(theirs.x_BTD, Tokens.plain(2, 12))
    y = y[0] if ours.gives else y
    torch.testing.assert_close(y, theirs.y_BTD, rtol=0, atol=5e-5)
    assert theirs.y_BTD.abs().max() > 0.1


def test_a_router_goes_on_with_the_one_above():
    """The second block of Zaya's, with what it gets from the first and gives on."""
    model, cls, config, fields = CASES["zaya"]
    theirs = layer(model, cls, index=1, **{**SMALL, **config})
    ours = module("moe", d_model=32, **{**fields, "router": router("mlp", d_router=12, carry="next")})
    ours.load_state_dict(renamed(theirs.weights), strict=True)
    above = torch.randn(2, 12, 12)
    with torch.no_grad():
        wanted, wanted_state = theirs.module(theirs.x_BTD, above)
        y, given = ours(theirs.x_BTD, Tokens.plain(2, 12), router=above)
    torch.testing.assert_close(y, wanted, rtol=0, atol=5e-5)
    torch.testing.assert_close(given["router"], wanted_state, rtol=0, atol=5e-5)
    assert (y - ours(theirs.x_BTD, Tokens.plain(2, 12), router=0 * above)[0]).abs().max() > 0.01


def test_no_expert_is_a_choice():
    """A token that skips gets nothing, with the share that it would have had; the bias chooses, and nothing else."""
    form = router("mlp", d_router=4, skip=True)
    logits = torch.tensor([[2.0, 1.0, 0.0, 3.0], [2.0, 1.0, 0.0, 1.0]])
    index, weight = route(torch.eye(4)[:2], logits.T.contiguous()[:, :2] @ torch.eye(2, 4), torch.zeros(4),
                          router=form, top_k=1)
    assert index.tolist() == [[0], [0]] and weight[0].item() == 0
    torch.testing.assert_close(weight[1, 0], logits[1].softmax(-1)[0])
    bias = torch.tensor([0, 0, 1.0, 0])
    index, weight = route(torch.eye(4)[:2], logits.T.contiguous()[:, :2] @ torch.eye(2, 4), bias, router=form, top_k=1)
    assert index.tolist() == [[2], [2]]
    torch.testing.assert_close(weight[:, 0], logits.softmax(-1)[:, 2])


def test_equals_granites_routed_and_shared_experts():
    config = dict(
        **SMALL, shared_intermediate_size=40, num_local_experts=6, num_experts_per_tok=3,
        layer_types=["full_attention"] * 2, position_embedding_type=None, mamba_n_heads=4,
    )
    routed = layer("GraniteMoeHybrid", "GraniteMoeHybridMoE", **config)
    shared = layer("GraniteMoeHybrid", "GraniteMoeHybridMLP", **config)
    granite = router("softmax", order="after_top_k")
    ours = module("moe", d_model=32, experts=6, top_k=3, shared_d_ff=40, router=granite, **SWIGLU)
    theirs = {
        **routed.weights,
        "shared.gate_up_proj.weight": shared.weights["input_linear.weight"],
        "shared.down_proj.weight": shared.weights["output_linear.weight"],
    }
    ours.load_state_dict(theirs, strict=True)
    y = ours(routed.x_BTD, Tokens.plain(2, 12))
    torch.testing.assert_close(y, routed.y_BTD + shared.y_BTD, rtol=0, atol=5e-5)


GRID = {
    "plain": {},
    "one of one": dict(experts=1, top_k=1),
    "all": dict(experts=4, top_k=4, router=router("softmax", order="after_top_k", scale=2)),
    "many experts, few tokens": dict(experts=64, top_k=1),
    "renormalised with eps": dict(
        experts=6, top_k=3, gated=True, router=router("softmax", renorm=True, renorm_eps=0.1)
    ),
    "sigmoid without bias": dict(experts=6, top_k=2, router=router("sigmoid", bias=False, renorm=False)),
    "groups of one": dict(experts=6, top_k=2, router=router("sigmoid", groups=6, top_groups=3)),
    "everything": dict(
        experts=8, top_k=3, gated=True, act="gelu", shared_d_ff=10, shared_gate="sigmoid", latent=6,
        router=router("sigmoid", groups=2, top_groups=1, scale=3, renorm_eps=0.2),
    ),
}


@pytest.mark.parametrize("name", GRID)
def test_equals_the_definition_forward_and_backward(name):
    made = module("moe", d_model=16, d_in=20, **{"d_ff": 12, **GRID[name]})
    x = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(1), requires_grad=True)
    mix = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    weights = dict(made.named_parameters())
    y = made(x, Tokens.plain(2, 7))
    expected, _ = naive({**weights, **dict(made.named_buffers())}, made.f, made.dims, x, Tokens.plain(2, 7))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad((y * mix).sum(), [x, *weights.values()])
    truths = torch.autograd.grad((expected * mix).sum(), [x, *weights.values()], allow_unused=True)
    for mine, truth in zip(gradients, truths):
        truth = torch.zeros_like(mine) if truth is None else truth
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def choose(logits: list[float], form: Variant, top_k: int, bias: Tensor | None = None) -> dict[int, float]:
    """Experts and weights of one token whose scores before the router's function are `logits`."""
    index, weight = route(torch.ones(1, 1), torch.tensor(logits)[:, None], bias, router=form, top_k=top_k)
    return dict(zip(index[0].tolist(), weight[0].tolist()))


TIED = [router("softmax"), router("sigmoid"), router("sigmoid", groups=4, top_groups=2)]


@pytest.mark.parametrize("form", TIED)
def test_equal_scores_go_to_the_lower_number(form):
    assert list(choose([0.0] * 64, form, 5, torch.zeros(64))) == [0, 1, 2, 3, 4]
    assert sorted(choose([0.0] * 32 + [1.0] + [0.0] * 31, form, 2)) == [0, 32]


def test_the_bias_chooses_and_does_not_weigh():
    bias = torch.tensor([0.0, 0.0, 5.0])
    weights = choose([1.0, 2.0, -1.0], router("sigmoid", renorm=False), 2, bias)
    assert weights == pytest.approx({2: 1 / (1 + 2.718281828), 1: 1 / (1 + 2.718281828**-2)})


def test_groups_are_judged_by_their_best_two():
    # The best single expert (3) is alone in its group; the other group's best two have the larger sum.
    logits = [2.0, 2.0, -9.0, 3.0, -9.0, -9.0]
    assert sorted(choose(logits, router("sigmoid", groups=2, top_groups=1), 2)) == [0, 1]
    assert sorted(choose(logits, router("sigmoid", groups=2, top_groups=2), 2)) == [0, 3]


def test_other_tokens_do_not_matter():
    """No capacity: a token's result is the same alone, in a crowd at one expert, and beside padding."""
    made = module("moe", d_model=16, d_ff=12, experts=4, top_k=2)
    x = torch.randn(1, 6, 16)
    crowd = torch.cat((x, x[:, :1].expand(1, 200, 16)), 1)
    alone = torch.cat([made(x[:, t : t + 1], Tokens.plain(1, 1)) for t in range(6)], 1)
    torch.testing.assert_close(made(crowd, Tokens.plain(1, 206))[:, :6], alone, rtol=0, atol=1e-5)


def test_the_router_stays_in_float32():
    """Scores that differ by less than bf16 can show still choose and weigh as in float32."""
    made = module("moe", d_model=16, d_ff=8, experts=2, top_k=1)
    narrow = get("moe").module()(made.f, made.dims, dtype=torch.bfloat16)
    seen = []
    narrow.parts["router"] = lambda *args, **more: seen.append(route(*args, **more)) or seen[0]
    with torch.no_grad():
        narrow.load_state_dict(made.state_dict())
        narrow.router.weight.fill_(1.0)
        narrow.router.weight[1, :2] = torch.tensor([1.0078125, 0.99609375])
        narrow(torch.full((1, 1, 16), 16.0, dtype=torch.bfloat16), Tokens.plain(1, 1))
    index, weight = seen[0]
    assert weight.dtype == torch.float32
    assert index.item() == 1 and weight.item() == pytest.approx(1 / (1 + 2.718281828**-0.0625), abs=1e-6)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_bfloat16_is_near_float32(name):
    made = module("moe", d_model=64, **GRID[name])
    narrow = get("moe").module()(made.f, made.dims, dtype=torch.bfloat16)
    narrow.load_state_dict(made.state_dict())
    # The float32 layer with the rounded weights, so that both choose the same experts.
    made.load_state_dict(narrow.state_dict())
    x = torch.randn(2, 40, 64).bfloat16()
    truth, y = made(x.float(), Tokens.plain(2, 40)), narrow(x, Tokens.plain(2, 40))
    assert y.dtype == torch.bfloat16
    assert (y.float() - truth).norm() / truth.norm() < 0.02
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in narrow.parameters())
