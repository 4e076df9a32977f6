"""Attention against Hugging Face's modules, and what is its own: windows, packing, ragged states."""

from __future__ import annotations

import pytest
import torch
from hf_layers import layer
from kind_values import module, values
from ragged import REAL, part_of, ragged

from mambadsl.kinds.attention.kind import QK_NORM, ROPE, ROPE_SCALING
from mambadsl.kinds.attention.naive import naive
from mambadsl.kinds.fields import Call, Word
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.registry import get
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values, Variant

GROUPED = dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=48)
HEADS = dict(heads=4, kv_heads=2)


def rope(theta=10000, *, fraction=1, scaling: str = "none", **of_scaling) -> Variant:
    scaled = ROPE_SCALING.convert(Call(scaling, {}))
    form = ROPE.convert(Word("rope"))
    changed = Variant(scaling, scaled.values.replace(**of_scaling))
    return Variant("rope", form.values.replace(theta=theta, fraction=fraction, scaling=changed))


PROPORTIONAL = Variant("proportional", ROPE.convert(Word("proportional")).values.replace(theta=100, fraction=0.5))


def qk_norm(form: str, eps: float) -> Variant:
    return Variant(form, QK_NORM.convert(Word(form)).values.replace(eps=eps))


def parameters(kind: str, theta: float = 10000.0, **more) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **more))


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(factor=4.0, beta_fast=8.0, beta_slow=1.0)

#: name: (model class, settings there, our fields)
CASES = {
    "jamba, no rope": (
        "Jamba",
        dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
             num_experts=2, num_experts_per_tok=1, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=2),
        {},
    ),
    "llama": ("Llama", dict(**parameters("default", 500.0)), dict(rope=rope(500))),
    "llama, bias, head_dim": (
        "Llama", dict(attention_bias=True, head_dim=12),
        dict(rope=rope(), head_dim=12, qkv_bias=True, o_bias=True),
    ),
    "llama, linear": ("Llama", parameters("linear", factor=3.0), dict(rope=rope(scaling="linear", factor=3))),
    "llama, dynamic": (
        "Llama", dict(max_position_embeddings=8, **parameters("dynamic", factor=2.0)),
        dict(rope=rope(scaling="dynamic", factor=2, original_context=8)),
    ),
    "llama, dynamic, short": (
        "Llama", dict(max_position_embeddings=64, **parameters("dynamic", factor=2.0)),
        dict(rope=rope(scaling="dynamic", factor=2, original_context=64)),
    ),
    "llama, llama3": (
        "Llama", dict(head_dim=32, **parameters("llama3", **LLAMA3, original_max_position_embeddings=64)),
        dict(head_dim=32, rope=rope(scaling="llama3", **LLAMA3, original_context=64)),
    ),
    "llama, yarn": (
        "Llama", dict(head_dim=32, **parameters("yarn", **YARN, original_max_position_embeddings=256)),
        dict(head_dim=32, rope=rope(scaling="yarn", **YARN, original_context=256)),
    ),
    "llama, yarn, factor": (
        "Llama",
        dict(**parameters("yarn", 100.0, **YARN, attention_factor=0.8, original_max_position_embeddings=16)),
        dict(rope=rope(100, scaling="yarn", **YARN, attention_factor=0.8, original_context=16)),
    ),
    "bamba, half of the channels": (
        "Bamba",
        dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4, mamba_chunk_size=8,
             head_dim=8, **parameters("default", partial_rotary_factor=0.5)),
        dict(rope=rope(fraction=0.5)),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(layers_block_type=["full_attention", "mlp"], num_hidden_layers=None, head_dim=16,
             mamba_num_heads=4),
        dict(head_dim=16),
    ),
    "granite": ("Granite", dict(attention_multiplier=0.3), dict(rope=rope(), scale=0.3)),
    "falcon_h1": (
        "FalconH1",
        dict(key_multiplier=0.35, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
             mamba_chunk_size=8, **parameters("default", 1e6)),
        dict(rope=rope(10**6), key_multiplier=0.35),
    ),
    "mistral": ("Mistral", dict(sliding_window=5), dict(rope=rope(), window=5)),
    "mistral, wide window": ("Mistral", dict(sliding_window=50), dict(rope=rope(), window=50)),
    "qwen3": (
        "Qwen3", dict(head_dim=8, rms_norm_eps=1e-3), dict(rope=rope(), qk_norm=qk_norm("per_head", 1e-3)),
    ),
    "olmo2": ("Olmo2", dict(rms_norm_eps=1e-3), dict(rope=rope(), qk_norm=qk_norm("full_width", 1e-3))),
    "gpt-oss": (
        "GptOss",
        dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5, attention_bias=True,
             layer_types=["sliding_attention", "full_attention"], **parameters("default", 500.0)),
        dict(rope=rope(500), sinks=True, window=5, qkv_bias=True, o_bias=True),
    ),
    "diffllama": ("DiffLlama", parameters("default", 500.0), dict(
        rope=rope(500),
        differential=Variant("halves", Values(eps=1e-5, weight=False)),
    )),
    "gemma2": (
        "Gemma2",
        dict(head_dim=8, attn_logit_softcapping=0.7, query_pre_attn_scalar=11, sliding_window=5,
             layer_types=["sliding_attention", "full_attention"]),
        dict(rope=rope(), softcap=0.7, scale=11**-0.5, window=5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face(name):
    model, config, fields = CASES[name]
    config = {k: v for k, v in {**GROUPED, **config}.items() if v is not None}
    theirs = layer(model, f"{model}Attention", length=16, **config)
    ours = module("attention", d_model=32, **{**HEADS, **fields})
    w = theirs.weights
    mine = {"o_proj.weight": w["o_proj.weight"]}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in w:
            mine[f"qkv_proj.{kind}"] = torch.cat([w[f"{p}_proj.{kind}"] for p in "qkv"])
    mine |= {n: t for n, t in w.items() if n in ("o_proj.bias", "q_norm.weight", "k_norm.weight", "sinks")}
    if "lambda_q1" in w:
        mine["lambda"] = torch.stack([w[f"lambda_{n}"] for n in ("q1", "k1", "q2", "k2")])
        mine["lambda_start"] = torch.tensor([theirs.module.lambda_init])
    ours.load_state_dict(mine, strict=True)
    y_BTD = ours(theirs.x_BTD, Tokens.plain(2, 16))
    torch.testing.assert_close(y_BTD, theirs.y_BTD, rtol=0, atol=5e-5)
    assert theirs.y_BTD.abs().max() > 0.1


GRID = {
    "plain": dict(rope=rope()),
    "one kv head": dict(kv_heads=1, rope=rope(fraction=0.5), head_dim=6),
    "window": dict(window=3, rope=rope()),
    "window of one": dict(window=1),
    "window beyond": dict(window=100, rope=rope()),
    "kept": dict(window=2, keep=2, rope=rope()),
    "kept, softcap": dict(window=1, keep=3, softcap=0.5),
    "softcap": dict(softcap=0.5, window=4, scale=0.9),
    "yarn": dict(rope=rope(50, scaling="yarn", **YARN, original_context=32)),
    "llama3": dict(rope=rope(50, scaling="llama3", **LLAMA3, original_context=16)),
    "dynamic": dict(rope=rope(scaling="dynamic", factor=2, original_context=2)),
    "two channels": dict(head_dim=2, rope=rope(scaling="dynamic", factor=2, original_context=2)),
    "proportional": dict(rope=PROPORTIONAL, head_dim=8),
    "sinks": dict(sinks=True, window=4),
    "sinks, softcap": dict(sinks=True, softcap=0.5, rope=rope()),
    "differential": dict(differential=Variant("halves", Values(eps=0.1, weight=True)), rope=rope(), window=5),
    "differential, gate, sinks": dict(
        differential=Variant("halves", Values(eps=0.1, weight=False)), sinks=True, out_gate="per_head",
    ),
    "gate": dict(out_gate="elementwise", rope=rope()),
    "gate of heads": dict(out_gate="per_head", window=3, qkv_bias=True),
    "everything": dict(
        rope=rope(100, fraction=0.5), window=4, qk_norm=qk_norm("full_width", 1e-3), softcap=2, qkv_bias=True,
        o_bias=True, key_multiplier=0.5, head_dim=12,
    ),
}

@pytest.mark.parametrize("name", GRID)
def test_ragged_rows_equal_the_definition_forward_and_backward(name):
    made = module("attention", d_model=16, **{**HEADS, **GRID[name]})
    x = torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(1))
    mix = torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(2)) * REAL[..., None]
    weights = dict(made.named_parameters())

    def run(y):
        return torch.autograd.grad((y * mix).sum(), list(weights.values()))

    y = made(x, ragged())
    expected, _ = naive({**weights, **dict(made.named_buffers())}, made.f, made.dims, x, ragged())
    assert y.isfinite().all()
    torch.testing.assert_close(y * REAL[..., None], expected * REAL[..., None], rtol=0, atol=1e-5)
    for mine, truth in zip(run(y), run(expected)):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(3, 4, 5, 6, 7, 8, 9), (4, 6), (1, 9), (2, 3)])
@pytest.mark.parametrize("name", [n for n in GRID if n not in ("dynamic", "two channels")])
def test_ragged_rows_in_chunks_equal_the_whole(name, cuts):
    """Chunks of many tokens and of one, mixed; padding and ends of documents fall in and between them."""
    made = module("attention", d_model=16, **{**HEADS, **GRID[name]})
    x = torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(1))
    whole = made(x, ragged()) * REAL[..., None]
    state = made.init_state(4, dtype=torch.float32)
    bounds = (0, *cuts, 10)
    chunks = [made(x[:, a:b], part_of(ragged(), a, b), state) for a, b in zip(bounds, bounds[1:])]
    torch.testing.assert_close(torch.cat(chunks, 1) * REAL[..., None], whole, rtol=0, atol=1e-5)
    kept = 10 if made.f.window is None else min(10, made.f.window - 1 + made.f.keep)
    assert {t.shape[1] for t in state.values()} == {kept}


def test_dynamic_rope_steps_agree_within_the_original_context():
    dynamic = rope(scaling="dynamic", factor=2, original_context=10)
    made = module("attention", d_model=16, **HEADS, rope=dynamic)
    x = torch.randn(2, 10, 16)
    state = made.init_state(2, dtype=torch.float32)
    steps = [made(x[:, t : t + 1], Tokens.plain(2, 1, start=t), state) for t in range(10)]
    torch.testing.assert_close(torch.cat(steps, 1), made(x, Tokens.plain(2, 10)), rtol=0, atol=1e-5)


def test_window_reaches_exactly_so_far():
    made = module("attention", d_model=16, **HEADS, window=3)
    x = torch.randn(1, 8, 16, requires_grad=True)
    for t in range(8):
        (g,) = torch.autograd.grad(made(x, Tokens.plain(1, 8))[0, t].sum(), x)
        reached = g[0].abs().sum(-1).nonzero().flatten().tolist()
        assert reached == list(range(max(0, t - 2), t + 1))


def test_no_gradient_between_documents_or_from_padding():
    made = module("attention", d_model=16, **HEADS, rope=rope(), softcap=1)
    x = torch.randn(4, 10, 16, requires_grad=True)
    (g,) = torch.autograd.grad(made(x, ragged())[0, 5:8].sum(), x)
    assert g[0].abs().sum(-1).nonzero().flatten().tolist() == [5, 6, 7]
    assert not g[1:].any()


@pytest.mark.parametrize("name", ["plain", "softcap", "everything"])
def test_bfloat16_is_near_float32(name):
    made = module("attention", d_model=64, **{**HEADS, **GRID[name]})
    narrow = get("attention").module()(made.f, made.dims, dtype=torch.bfloat16)
    narrow.load_state_dict(made.state_dict())
    rows = ragged()
    x = torch.randn(4, 10, 64, generator=torch.Generator().manual_seed(3))
    state = narrow.init_state(4, dtype=torch.bfloat16)
    truth, whole = made(x, rows), narrow(x.bfloat16(), rows)
    chunks = [narrow(x[:, a:b].bfloat16(), part_of(rows, a, b), state) for a, b in ((0, 5), (5, 6), (6, 10))]
    for y in (whole, torch.cat(chunks, 1)):
        assert y.dtype == torch.bfloat16
        error = (y.float() - truth)[REAL].norm() / truth[REAL].norm()
        assert error < 0.02
    whole.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in narrow.parameters())


def test_a_part_replaces_the_core():
    calls = []

    def core(q, k, v, queries, keys, *, scale, window, softcap):
        calls.append((tuple(q.shape), tuple(k.shape), keys is queries, scale, window, softcap))
        return torch.zeros_like(q)

    f = values("attention", d_model=16, **HEADS, o_bias=True, window=4)
    made = get("attention").module()(f, Dims(16, 16), parts={"core": core})
    for weight in made.parameters():
        torch.nn.init.ones_(weight)
    state = made.init_state(2, dtype=torch.float32)
    y = made(torch.randn(2, 3, 16), Tokens.plain(2, 3), state)
    made(torch.randn(2, 1, 16), Tokens.plain(2, 1, start=3), state)
    assert calls == [
        ((2, 3, 4, 4), (2, 3, 2, 4), True, 0.5, 4, None),
        ((2, 1, 4, 4), (2, 4, 2, 4), False, 0.5, 4, None),
    ]
    assert (y == made.o_proj.bias).all()
