"""Gated DeltaNet against its definition, against itself cut otherwise, and against Hugging Face's layers."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
import torch.nn.functional as F
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.gated_delta_net.module import Module, gated_delta_rule
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

SMALL = dict(d_model=8, heads=4, key_heads=2, key_dim=3, value_dim=5, chunk=4)
CASES = {
    "default": SMALL,
    "as many keys": dict(SMALL, key_heads=4),
    "one key head, a bias": dict(SMALL, key_heads=1, conv_bias=True),
    "negative eigenvalues": dict(SMALL, negative_eigenvalues=True, chunk=100),
    "no convolution": dict(SMALL, d_conv=1, chunk=1),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("gated_delta_net", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    # A single channel is 1 or -1 but near 0, where a rounding becomes a thousand times as large.
    key_heads=st.integers(1, 2), share=st.integers(1, 3), key_dim=st.integers(2, 5), value_dim=st.integers(1, 5),
    d_conv=st.integers(1, 5), chunk=st.integers(1, 20), length=st.integers(1, 20), negative_eigenvalues=st.booleans(),
)
def test_is_naive_for_any_fields(length, share, key_heads, **fields):
    """With large eps: the gradient of a short vector's direction is as large as its rounding."""
    fields |= dict(heads=share * key_heads, key_heads=key_heads, qk_eps=0.1, norm_eps=0.01)
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
    """Queries and keys of three channels are divided by their length: what rounding did to it counts in full."""
    laws.bf16_is_near(made(**fields), tolerance=0.06)


def scan_inputs(B=2, T=150, H=4, K=2, E=6, P=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(s, generator=g) for s in ((B, T, K, E), (B, T, K, E), (B, T, H, P)))
    return q, k, v, -F.softplus(torch.randn(B, T, H, generator=g)), torch.rand(B, T, H, generator=g) * 2


def test_chunk_does_not_matter():
    segments = torch.arange(150, dtype=torch.int32).expand(2, -1) // 37
    for documents in (None, segments):
        y, state = gated_delta_rule(*scan_inputs(), chunk=1, eps=1e-6, segments_BT=documents)
        for chunk in (2, 7, 64, 1000):
            y_chunk, state_chunk = gated_delta_rule(*scan_inputs(), chunk=chunk, eps=1e-6, segments_BT=documents)
            laws.same(y_chunk, y)
            laws.same(state_chunk, state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [-1e38, -1e3, -1e-30, 0.0])
def test_extreme_decays_are_finite(decay, packed):
    q, k, v, _, beta = scan_inputs()
    log_decay = torch.full((2, 150, 4), decay)
    leaves = [t.requires_grad_() for t in (q, k, v, log_decay, beta)]
    segments = torch.arange(150, dtype=torch.int32).expand(2, -1) // 37 if packed else None
    y, state = gated_delta_rule(*leaves, chunk=64, eps=1e-6, segments_BT=segments)
    (y.sum() + state.sum()).backward()
    for tensor in (y, state, *(t.grad for t in leaves)):
        assert tensor.isfinite().all()


def test_one_key_many_times_is_stable():
    """Equal keys make the triangular system as full as it gets; with beta 2 the state flips, and does not grow."""
    q, k, v, _, _ = scan_inputs(T=512)
    k = k[:, :1].expand_as(k)
    y, state = gated_delta_rule(
        q, k, v, torch.zeros(2, 512, 4), torch.full((2, 512, 4), 2.0), chunk=64, eps=1e-6
    )
    assert y.abs().max() < 1e4 and state.abs().max() < 1e4


LINEAR = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=12,
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
)


def qwen_weights(weights: dict) -> dict:
    """Their projections hold q, k, v and z (b and a) of one key head side by side."""
    qkvz = weights["in_proj_qkvz.weight"].unflatten(0, (2, -1)).split([8, 8, 24, 24], 1)
    ba = weights["in_proj_ba.weight"].unflatten(0, (2, -1)).split([2, 2], 1)
    return {
        "in_proj.weight": torch.cat([t.flatten(0, 1) for t in (*qkvz, *ba)]),
        "conv.weight": weights["conv1d.weight"].squeeze(1), "dt_bias": weights["dt_bias"],
        "A_log": weights["A_log"], "gate_norm.weight": weights["norm.weight"],
        "out_proj.weight": weights["out_proj.weight"],
    }


def olmo_weights(weights: dict) -> dict:
    return {
        "in_proj.weight": torch.cat([weights[f"{n}_proj.weight"] for n in "qkvgba"]),
        "conv.weight": weights["conv1d.weight"].squeeze(1), "dt_bias": weights["dt_bias"],
        "A_log": weights["A_log"], "gate_norm.weight": weights["o_norm.weight"],
        "out_proj.weight": weights["o_proj.weight"],
    }


HF = {
    "qwen3_next": (
        "Qwen3Next", "Qwen3NextGatedDeltaNet", dict(
            LINEAR, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
            head_dim=16,
        ), qwen_weights, {},
    ),
    "olmo_hybrid": (
        "OlmoHybrid", "OlmoHybridGatedDeltaNet", dict(LINEAR, linear_allow_neg_eigval=True), olmo_weights,
        dict(negative_eigenvalues=True, norm_eps=1e-5),
    ),
}


@pytest.mark.parametrize("case", HF.values(), ids=HF)
def test_is_hugging_face(case):
    model, mixer, config, names, fields = case
    theirs = layer(model, mixer, length=83, **config)
    ours = Module(
        values("gated_delta_net", d_model=32, heads=4, key_heads=2, key_dim=8, value_dim=12, **fields), Dims(32, 32)
    )
    ours.load_state_dict(names(theirs.weights))
    y = ours(theirs.x_BTD, Tokens.plain(*theirs.x_BTD.shape[:2]))
    assert (y - theirs.y_BTD).abs().max() <= 1e-4


def test_rounding_of_sums_takes_no_gradient():
    """Running sums of packed rows are not monotone to the last bit: weak decays keep their gradients."""
    from mambadsl.kinds.chunks import decay, running_sums

    generator = torch.Generator().manual_seed(0)
    log_decay = -1e-7 * torch.rand(1, 1, 64, 200, generator=generator)
    log_decay[:, :, ::5] = -3 * torch.rand(200, generator=generator)
    sums = running_sums(log_decay, torch.zeros(1, 1, 64, dtype=torch.long)).transpose(2, 3)
    between = (sums[..., :, None] - sums[..., None, :]).tril(-1)
    assert (between > 0).any(), "a case in which rounding shows"
    between = between.detach().requires_grad_()
    decay(between).sum().backward()
    torch.testing.assert_close(between.grad, between.exp(), atol=1e-4, rtol=0)
    assert decay(torch.tensor([1e9, float("inf")])).isfinite().all()
