"""Kimi Delta Attention against its definition, against itself cut otherwise, and against Hugging Face's layers."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
import torch.nn.functional as F
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.fields import Word
from mambadsl.kinds.gated_delta_net.module import gated_delta_rule
from mambadsl.kinds.kimi_delta.kind import DECAY
from mambadsl.kinds.kimi_delta.module import Module, kimi_delta_rule
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values, Variant

torch.set_num_threads(1)

SOFTPLUS, BOUNDED = (DECAY.convert(Word(form)) for form in ("softplus", "bounded"))
FULL = dict(decay_rank=None, gate_rank=None)
SMALL = dict(d_model=8, heads=4, key_dim=3, value_dim=5, chunk=4)
CASES = {
    "default": SMALL,
    "full rank, bounded": dict(SMALL, decay=BOUNDED, **FULL),
    "bounded near 0": dict(SMALL, decay=Variant("bounded", Values(lower_bound=-0.01)), gate_rank=2),
    "chunk of no power of two, a bias": dict(SMALL, chunk=5, conv_bias=True, decay_rank=None),
    "one chunk": dict(SMALL, chunk=100, gate_rank=None),
    "no convolution": dict(SMALL, d_conv=1, chunk=1),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("kimi_delta", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    # A single channel is 1 or -1 but near 0, where a rounding becomes a thousand times as large.
    heads=st.integers(1, 3), key_dim=st.integers(2, 5), value_dim=st.integers(1, 5), d_conv=st.integers(1, 5),
    chunk=st.integers(1, 20), length=st.integers(1, 20), decay=st.sampled_from([BOUNDED, SOFTPLUS]),
    decay_rank=st.sampled_from([None, 1, 4]), gate_rank=st.sampled_from([None, 1, 4]),
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
])
@EACH
def test_laws(fields, law):
    law(made(**fields))


@EACH
def test_bf16_is_near(fields):
    """Of more channels: short queries and keys, divided by their length, pass on in full what rounding did to them."""
    laws.bf16_is_near(made(**{**fields, "key_dim": 16}), tolerance=0.06)


def scan_inputs(B=2, T=150, H=3, E=6, P=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(s, generator=g) for s in ((B, T, H, E), (B, T, H, E), (B, T, H, P)))
    return q, k, v, -F.softplus(torch.randn(B, T, H, E, generator=g)), torch.rand(B, T, H, generator=g)


def documents(packed: bool):
    return torch.arange(150, dtype=torch.int32).expand(2, -1) // 37 if packed else None


@pytest.mark.parametrize("packed", [False, True])
def test_chunk_does_not_matter(packed):
    y, state = kimi_delta_rule(*scan_inputs(), chunk=1, eps=1e-6, segments_BT=documents(packed))
    for chunk in (2, 7, 64, 1000):
        y_chunk, state_chunk = kimi_delta_rule(*scan_inputs(), chunk=chunk, eps=1e-6, segments_BT=documents(packed))
        laws.same(y_chunk, y)
        laws.same(state_chunk, state)


@pytest.mark.parametrize("packed", [False, True])
def test_equal_decays_are_gated_delta_net(packed):
    q, k, v, log_decay, beta = scan_inputs()
    shape = dict(chunk=32, eps=1e-6, segments_BT=documents(packed))
    same = log_decay[..., :1]
    y, state = kimi_delta_rule(q, k, v, same.expand_as(log_decay), beta, **shape)
    y_one, state_one = gated_delta_rule(q, k, v, same[..., 0], beta, **shape)
    laws.same(y, y_one)
    laws.same(state, state_one)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [-1e38, -1e3, -1e-30, 0.0, "channels"])
def test_extreme_decays_are_finite(decay, packed):
    """`channels`: one forgets at once, its neighbour never."""
    q, k, v, log_decay, beta = scan_inputs()
    extremes = torch.tensor([-1e38, 0.0]).repeat(3) if decay == "channels" else torch.tensor(decay)
    leaves = [t.requires_grad_() for t in (q, k, v, extremes.expand_as(log_decay).clone(), beta)]
    y, state = kimi_delta_rule(*leaves, chunk=64, eps=1e-6, segments_BT=documents(packed))
    (y.sum() + state.sum()).backward()
    for tensor in (y, state, *(t.grad for t in leaves)):
        assert tensor.isfinite().all()


def test_strong_decays_are_exact():
    """Over a chunk of such decays no factor of one side may overflow, and what is left stays exact."""
    q, k, v, _, beta = scan_inputs(T=64)
    log_decay = torch.linspace(-30, -0.01, 6).expand(2, 64, 3, 6)
    y, state = kimi_delta_rule(q, k, v, log_decay, beta, chunk=64, eps=1e-6)
    y_64, state_64 = stepwise(*(t.double() for t in (q, k, v, log_decay, beta)))
    laws.same(y, y_64)
    laws.same(state, state_64)


def stepwise(q, k, v, log_decay, beta):
    """Token by token, in float64."""
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    state, ys = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = state * log_decay[:, t, ..., None].exp()
        error = v[:, t] - torch.einsum("bhe,bhep->bhp", k[:, t], state)
        state = state + torch.einsum("bhe,bhp,bh->bhep", k[:, t], error, beta[:, t])
        ys.append(torch.einsum("bhe,bhep->bhp", q[:, t], state) * q.shape[-1] ** -0.5)
    return torch.stack(ys, 1), state


KIMI = dict(
    intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, linear_head_dim=8, linear_num_heads=4,
    moe_intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
    layer_types=["linear_attention", "full_attention"],
)
LING = dict(
    intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8, layer_group_size=2, moe_intermediate_size=24,
    num_local_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, num_mtp_layers=0,
)
LAYERS = dict(heads=4, key_dim=8, value_dim=8)
#: Our name -> theirs, joined.
ALL = {
    "conv.weight": ["conv1d.weight"], "dt_bias": ["forget_gate.dt_bias"], "A_log": ["forget_gate.A_log"],
    "gate_norm.weight": ["o_norm.weight"], "out_proj.weight": ["o_proj.weight"],
}
LOW_RANK = {
    **ALL, "in_proj.weight": [f"{n}.weight" for n in (
        "q_proj", "k_proj", "v_proj", "g_a_proj", "b_proj", "forget_gate.f_a_proj",
    )],
    "decay_proj.weight": ["forget_gate.f_b_proj.weight"], "gate_proj.weight": ["g_b_proj.weight"],
}
FULL_RANK = {
    **ALL, "in_proj.weight": [f"{n}.weight" for n in (
        "q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "forget_gate.f_proj",
    )],
}
HF = {
    "kimi_linear": ("KimiLinear", KIMI, LOW_RANK, dict(norm_eps=1e-5)),
    "kimi_linear, other sizes": (
        "KimiLinear", dict(KIMI, linear_conv_kernel_dim=3, linear_num_heads=5, rms_norm_eps=1e-3), LOW_RANK,
        dict(norm_eps=1e-3, heads=5, d_conv=3),
    ),
    "bailing_hybrid": ("BailingHybrid", LING, FULL_RANK, dict(decay=BOUNDED, **FULL)),
    "bailing_hybrid, lower bound": (
        "BailingHybrid", dict(LING, kda_lower_bound=-2.0), FULL_RANK,
        dict(decay=Variant("bounded", Values(lower_bound=-2)), **FULL),
    ),
    "bailing_hybrid, softplus": ("BailingHybrid", dict(LING, kda_safe_gate=False), FULL_RANK, FULL),
}


@pytest.mark.parametrize("case", HF.values(), ids=HF)
def test_is_hugging_face(case):
    model, config, names, fields = case
    theirs = layer(model, f"{model}DeltaAttention", length=83, **config)
    ours = Module(values("kimi_delta", d_model=32, **{**LAYERS, **fields}), Dims(32, 32))
    weights = {ours: torch.cat([theirs.weights[n] for n in found]) for ours, found in names.items()}
    weights["conv.weight"], weights["A_log"] = weights["conv.weight"].squeeze(1), weights["A_log"].flatten()
    ours.load_state_dict(weights)
    y = ours(theirs.x_BTD, Tokens.plain(*theirs.x_BTD.shape[:2]))
    assert theirs.y_BTD.abs().max() > 0.1
    assert (y - theirs.y_BTD).abs().max() <= 1e-4
