"""Multi-head latent attention against its definition, its absorbed form, and Hugging Face's layers."""

from __future__ import annotations

import pytest
import torch
from hf_layers import layer
from kind_values import module
from ragged import REAL, part_of, ragged

from mambadsl.kinds.attention.kind import ROPE_SCALING
from mambadsl.kinds.fields import Call, Word
from mambadsl.kinds.mla.kind import ROPE
from mambadsl.kinds.mla.naive import naive
from mambadsl.kinds.state import Room
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Variant

SMALL = dict(d_model=16, heads=3, nope_dim=5, rope_dim=4, value_dim=6, kv_rank=7)


def rope(theta=10000, *, pairs="half", scaling: str = "none", **of_scaling) -> Variant:
    scaled = ROPE_SCALING.convert(Call(scaling, {}))
    form = ROPE.convert(Word("rope"))
    changed = Variant(scaling, scaled.values.replace(**of_scaling))
    return Variant("rope", form.values.replace(theta=theta, pairs=pairs, scaling=changed))


YARN = dict(factor=4.0, beta_fast=8.0, beta_slow=1.0, original_context=32)
GRID = {
    "no rope": {},
    "a latent of queries": dict(q_rank=9),
    "halves": dict(rope=rope(100)),
    "neighbours": dict(rope=rope(100, pairs="interleaved"), out_gate="per_head"),
    "yarn": dict(rope=rope(50, pairs="interleaved", scaling="yarn", **YARN), scale=0.7),
    "gate": dict(out_gate="elementwise", norm_eps=1e-3),
    "wide values": dict(value_dim=20, heads=1, q_rank=2, rope=rope()),
    "wide keys": dict(nope_dim=1, rope_dim=12, value_dim=2, rope=rope(pairs="interleaved")),
}
EACH = pytest.mark.parametrize("name", GRID)


def made(name: str):
    return module("mla", **{**SMALL, **GRID[name]})


def inputs(batch=4, length=10, seed=1):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


@EACH
def test_ragged_rows_equal_the_definition_forward_and_backward(name):
    layer, x, mix = made(name), inputs(), inputs(seed=2) * REAL[..., None]
    weights = dict(layer.named_parameters())

    def run(y):
        return torch.autograd.grad((y * mix).sum(), list(weights.values()))

    y = layer(x, ragged())
    expected, _ = naive(weights, layer.f, layer.dims, x, ragged())
    assert y.isfinite().all()
    torch.testing.assert_close(y * REAL[..., None], expected * REAL[..., None], rtol=0, atol=1e-5)
    for mine, truth in zip(run(y), run(expected)):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(3, 4, 5, 6, 7, 8, 9), (4, 6), (1, 9), (2, 3)])
@EACH
def test_ragged_rows_in_chunks_equal_the_whole(name, cuts):
    """Chunks of many tokens and of one, mixed; padding and ends of documents fall in and between them."""
    layer, x = made(name), inputs()
    whole = layer(x, ragged()) * REAL[..., None]
    state = layer.init_state(4, dtype=torch.float32)
    bounds = (0, *cuts, 10)
    chunks = [layer(x[:, a:b], part_of(ragged(), a, b), state) for a, b in zip(bounds, bounds[1:])]
    torch.testing.assert_close(torch.cat(chunks, 1) * REAL[..., None], whole, rtol=0, atol=1e-5)
    assert state["latent"].shape == (4, 10, layer.f.kv_rank + layer.f.rope_dim)


@EACH
def test_the_absorbed_form_equals_the_plain_one(name):
    """A token after seven others, attended to in the latent and by the keys and values of every head."""
    layer, x = made(name), inputs(length=8)
    absorbed, plain = [], []
    for outputs, form in (absorbed, layer._latents), (plain, layer._heads):
        layer._latents, state = form, layer.init_state(4, dtype=torch.float32)
        layer(x[:, :7], Tokens.plain(4, 7), state)
        outputs.append(layer(x[:, 7:], Tokens.plain(4, 1, start=7), state))
        del layer._latents
    torch.testing.assert_close(absorbed, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain[0], layer(x, Tokens.plain(4, 8))[:, 7:], rtol=0, atol=1e-5)


@EACH
def test_a_state_of_fixed_size_equals_the_whole(name):
    """A prompt padded on the left, then single tokens into the slots that there are."""
    layer, x = made(name), inputs(2, 9)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, :2] = False
    room = Room(12)
    state = layer.init_state(2, dtype=torch.float32, room=room)
    outputs = [layer(x[:, :5], Tokens.padded(valid), state)]
    room.used += 5
    for t in range(5, 9):
        outputs.append(layer(x[:, t : t + 1], Tokens(torch.tensor([[t], [t - 2]])), state))
        room.used += 1
    y = torch.cat(outputs, 1)
    torch.testing.assert_close(y[:1], layer(x[:1], Tokens.plain(1, 9)), rtol=0, atol=1e-5)
    torch.testing.assert_close(y[1:, 2:], layer(x[1:, 2:], Tokens.plain(1, 7)), rtol=0, atol=1e-5)
    assert state["latent"].shape[1] == 13


def test_no_gradient_between_documents_or_from_padding():
    layer, x = made("neighbours"), inputs().requires_grad_()
    (g,) = torch.autograd.grad(layer(x, ragged())[0, 5:8].sum(), x)
    assert g[0].abs().sum(-1).nonzero().flatten().tolist() == [5, 6, 7]
    assert not g[1:].any()


def test_the_core_is_called_as_attention_calls_its_own():
    """Of a prompt with the keys and values of every head, of single tokens with one head of latents."""
    calls, layer = [], made("no rope")

    def core(q, k, v, queries, keys, *, scale, window, softcap):
        calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), keys is queries))
        assert (scale, window, softcap) == (9**-0.5, None, None)
        return v[:, : q.shape[1]].expand(*q.shape[:3], -1)

    layer.parts["core"] = core
    state = layer.init_state(2, dtype=torch.float32)
    layer(inputs(2, 4), Tokens.plain(2, 4), state)
    layer(inputs(2, 1), Tokens.plain(2, 1, start=4), state)
    assert calls == [
        ((2, 4, 3, 9), (2, 4, 3, 9), (2, 4, 3, 6), True), ((2, 1, 3, 11), (2, 5, 1, 11), (2, 5, 1, 7), False),
    ]


THEIRS = dict(
    intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10, moe_intermediate_size=24, num_local_experts=4,
    num_experts_per_tok=2,
)
KIMI = dict(THEIRS, linear_head_dim=8, linear_num_heads=4, layer_types=["linear_attention", "full_attention"])
LING = dict(THEIRS, head_dim=8, layer_group_size=2, n_group=2, topk_group=1, num_mtp_layers=0)
SCALED = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, beta_fast=8.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.5,
    original_max_position_embeddings=32,
)
DEEPSEEK = dict(
    THEIRS, qk_head_dim=20, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=6,
    first_k_dense_replace=1, head_dim=8,
)
HF = {
    "kimi_linear": ("KimiLinear", KIMI, {}),
    "kimi_linear, a latent of queries": ("KimiLinear", dict(KIMI, q_lora_rank=6), dict(q_rank=6)),
    "bailing_hybrid": (
        "BailingHybrid", LING, dict(rope=rope(6_000_000, pairs="interleaved"), out_gate="per_head"),
    ),
    "bailing_hybrid, yarn": (
        "BailingHybrid", dict(LING, rope_parameters=SCALED),
        dict(
            rope=rope(100, pairs="interleaved", scaling="yarn", **YARN, attention_factor=1.13863 / 1.069315),
            out_gate="per_head", scale=20**-0.5 * 1.0693147180559945**2,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3", dict(DEEPSEEK, rope_interleave=True), dict(q_rank=6, rope=rope(pairs="interleaved")),
    ),
    "deepseek_v3, halves": ("DeepseekV3", dict(DEEPSEEK, rope_interleave=False), dict(q_rank=6, rope=rope())),
}


def ours_of(w: dict, *, heads: int, nope_dim: int) -> dict:
    """Their kv_b_proj has keys and values of each head side by side."""
    entries = ["q_a_proj" if "q_a_proj.weight" in w else "q_proj", "kv_a_proj_with_mqa", "g_proj"]
    k, v = (
        t.flatten(0, 1) for t in w["kv_b_proj.weight"].unflatten(0, (heads, -1)).tensor_split([nope_dim], 1)
    )
    found = {
        "in_proj.weight": torch.cat([w[f"{n}.weight"] for n in entries if f"{n}.weight" in w]),
        "latent_norm.weight": w["kv_a_layernorm.weight"], "kv_proj.weight": torch.cat((k, v)),
        "o_proj.weight": w["o_proj.weight"],
    }
    if "q_a_proj.weight" in w:
        found |= {"q_norm.weight": w["q_a_layernorm.weight"], "q_proj.weight": w["q_b_proj.weight"]}
    return found


@pytest.mark.parametrize("name", HF)
def test_is_hugging_face(name):
    model, config, fields = HF[name]
    theirs = layer(model, f"{model}Attention", length=16, index=-1, **config)
    ours = module(
        "mla", **{**dict(d_model=32, heads=4, nope_dim=12, rope_dim=8, value_dim=10, kv_rank=16), **fields}
    )
    ours.load_state_dict(ours_of(theirs.weights, heads=4, nope_dim=12), strict=True)
    y_BTD = ours(theirs.x_BTD, Tokens.plain(2, 16))
    torch.testing.assert_close(y_BTD, theirs.y_BTD, rtol=0, atol=5e-5)
    assert theirs.y_BTD.abs().max() > 0.1
