"""Mamba-2 against its definition, against itself cut otherwise, and against Hugging Face's layers."""

from __future__ import annotations

import pytest
import recurrent_laws as laws
import torch
import torch.nn.functional as F
from hf_layers import layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_values import module, values

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.mamba2.kind import KIND
from mambadsl.kinds.mamba2.module import Module, ssd
from mambadsl.kinds.tokens import Tokens

torch.set_num_threads(1)

SMALL = dict(d_model=8, heads=4, head_dim=3, d_state=5, chunk=4)
#: Every field that changes the result, away from its default.
RICH = dict(
    **SMALL, groups=2, norm_groups=4, gated_norm="before_gate", bias=True, dt_limit=(0.3, 0.9),
    proj_multipliers=(0.5, 1.5, 0.7, 1.3, 2),
)
CASES = {
    "default": dict(SMALL),
    "rich": RICH,
    "no norm": dict(SMALL, gated_norm="none", conv_bias=False, groups=4),
    "no convolution": dict(SMALL, d_conv=1, bias=True),
    "long convolution": dict(SMALL, d_conv=7, groups=2, dt_limit=(0, 0.5)),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("mamba2", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    heads_of_groups=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (3, 3)]), head_dim=st.integers(1, 4),
    d_state=st.integers(1, 6), d_conv=st.integers(1, 5), chunk=st.integers(1, 20), conv_bias=st.booleans(),
    bias=st.booleans(), gated_norm=st.sampled_from(["after_gate", "before_gate", "none"]),
    dt_limit=st.sampled_from([(0, None), (0.2, None), (0, 0.6), (0.2, 0.6)]), length=st.integers(1, 20),
)
def test_is_naive_for_any_fields(heads_of_groups, length, **fields):
    heads, groups = heads_of_groups
    # A small eps makes norms of so few channels ill-conditioned: float32 naive is 1e-5 off float64 itself.
    layer = made(d_model=6, heads=heads, groups=groups, norm_groups=heads, norm_eps=0.1, **fields)
    laws.is_naive(layer, Tokens.plain(2, length))


@EACH
@BOTH
@laws.CUTS
def test_chunks_are_whole(fields, tokens, cuts):
    laws.chunks_are_whole(made(**fields), tokens, cuts)


@EACH
def test_documents_are_apart(fields):
    laws.documents_are_apart(made(**fields))


@EACH
def test_nothing_leaks(fields):
    laws.nothing_leaks(made(**fields))


@EACH
def test_padding_is_nothing(fields):
    laws.padding_is_nothing(made(**fields))


@EACH
def test_other_document_forgets(fields):
    laws.other_document_forgets(made(**fields))


@EACH
def test_bf16_is_near(fields):
    laws.bf16_is_near(made(**fields))


def test_every_slot_has_a_definition():
    assert list(Module.REFERENCE) == [slot.name for slot in KIND.slots if not slot.optional]


def test_parts_replace_slots():
    used = []

    def scan(*args, **kwargs):
        used.append("scan")
        return ssd(*args, **kwargs)

    f = values("mamba2", **SMALL)
    layer = Module(f, Dims(8, 8), parts={"scan": scan})
    layer.load_state_dict(made(**SMALL).state_dict())
    x = laws.inputs(layer, batch=1, length=5)
    laws.same(layer(x, Tokens.plain(1, 5)), made(**SMALL)(x, Tokens.plain(1, 5)))
    assert used == ["scan"]


def scan_inputs(B=2, T=150, H=4, P=3, G=2, N=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dt, A, b, c, d = (
        torch.randn(shape, generator=generator)
        for shape in ((B, T, H, P), (B, T, H), (H,), (B, T, G, N), (B, T, G, N), (H,))
    )
    return x, F.softplus(dt), -A.exp(), b, c, d


def test_chunk_does_not_matter():
    """Chunks of one token to more than there are, across several chunks, with and without documents."""
    segments = torch.arange(150, dtype=torch.int32).expand(2, -1) // 37
    for documents in (None, segments):
        y, state = ssd(*scan_inputs(), chunk=1, segments_BT=documents)
        for chunk in (2, 7, 64, 1000):
            y_chunk, state_chunk = ssd(*scan_inputs(), chunk=chunk, segments_BT=documents)
            laws.same(y_chunk, y)
            laws.same(state_chunk, state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dt, A", [(1e4, 1e30), (1e4, 1e-30), (0, 1e30), (1e-30, 1e4), (30, 1e3)])
def test_extreme_decays_are_finite(dt, A, packed):
    x, _, _, b, c, d = scan_inputs()
    dt = torch.full((2, 150, 4), float(dt), requires_grad=True)
    A = torch.full((4,), -A, requires_grad=True)
    x.requires_grad_()
    segments = torch.arange(150, dtype=torch.int32).expand(2, -1) // 37 if packed else None
    y, state = ssd(x, dt, A, b, c, d, chunk=16, segments_BT=segments)
    (y.sum() + state.sum()).backward()
    for tensor in (y, state, x.grad, dt.grad, A.grad):
        assert tensor.isfinite().all()


def test_forgetting_costs_no_precision():
    """A token that erases all, now and then, does not blur the small decays of those around it."""
    x, dt, A, b, c, d = scan_inputs(G=4)
    dt = torch.where(torch.arange(150)[None, :, None] % 10 == 3, 1e6, dt * 1e-3)
    x = x / dt[..., None]
    y, state = ssd(x, dt, A, b, c, d, chunk=64)
    S, expected = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for x_t, dt_t, b_t, c_t in zip(*(t.double().unbind(1) for t in (x, dt, b, c))):
        S = S * (dt_t * A).exp()[..., None, None] + (x_t * dt_t[..., None])[..., None] * b_t[:, :, None]
        expected.append((S @ c_t[..., None])[..., 0] + d[:, None] * x_t)
    laws.same(y, torch.stack(expected, 1))
    laws.same(state, S)


def test_time_is_linear_in_length():
    """The work recorded for the backward pass: twice the tokens, twice the elements."""
    def elements(T):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            x, *others = scan_inputs(T=T)
            ssd(x.requires_grad_(), *others, chunk=32)
        return sum(kept)

    assert elements(1024) / elements(512) == pytest.approx(2, rel=0.05)


MAMBA2 = dict(num_heads=8, head_dim=8, state_size=16, n_groups=1, num_hidden_layers=1, chunk_size=8)
BAMBA = dict(
    intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, mamba_n_heads=8,
    mamba_d_state=16, mamba_expand=2, mamba_chunk_size=8,
)
ZAMBA2 = dict(
    intermediate_size=48, num_hidden_layers=2, layers_block_type=["linear_attention", "hybrid"],
    mamba_d_state=16, n_mamba_heads=8, chunk_size=8, num_attention_heads=4, num_key_value_heads=4,
    adapter_rank=4,
)
NEMOTRON = dict(
    intermediate_size=48, layers_block_type=["linear_attention", "mlp"], num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=8, n_groups=2,
    chunk_size=8,
)
FALCON_H1 = dict(
    intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2, mamba_chunk_size=8,
    ssm_multipliers=[0.5, 1.5, 0.7, 1.3, 2.0],
)
GRANITE = dict(BAMBA, num_local_experts=2, num_experts_per_tok=1, layer_types=["mamba", "attention"])
OURS = dict(heads=8, head_dim=8, d_state=16, chunk=8)
SCALES = (0.5, 1.5, 0.7, 1.3, 2)

#: name: (model class, layer class, settings there, our fields)
HF = {
    "mamba2": ("Mamba2", "Mamba2Mixer", MAMBA2, {}),
    "mamba2 groups": (
        "Mamba2", "Mamba2Mixer", {**MAMBA2, "n_groups": 4, "use_bias": True}, dict(groups=4, bias=True),
    ),
    "mamba2 dt_limit": (
        "Mamba2", "Mamba2Mixer", dict(MAMBA2, time_step_limit=(0.5, 1.0), use_conv_bias=False),
        dict(dt_limit=(0.5, 1), conv_bias=False),
    ),
    "bamba": ("Bamba", "BambaMixer", dict(BAMBA, attn_layer_indices=[1]), {}),
    "granite": ("GraniteMoeHybrid", "GraniteMoeHybridMambaLayer", GRANITE, {}),
    # These two clamp dt from below in a full forward pass, and say so nowhere in their configurations.
    "zamba2": ("Zamba2", "Zamba2MambaMixer", ZAMBA2, dict(dt_limit=(0.001, None))),
    "nemotron_h": ("NemotronH", "NemotronHMamba2Mixer", NEMOTRON, dict(groups=2, dt_limit=(0.001, None))),
    "falcon_h1": (
        "FalconH1", "FalconH1Mixer", FALCON_H1, dict(groups=2, gated_norm="none", proj_multipliers=SCALES),
    ),
    "falcon_h1 norm": (
        "FalconH1", "FalconH1Mixer", dict(FALCON_H1, mamba_rms_norm=True, mamba_norm_before_gate=False),
        dict(groups=2, proj_multipliers=SCALES),
    ),
    "falcon_h1 norm before": (
        "FalconH1", "FalconH1Mixer", dict(FALCON_H1, mamba_rms_norm=True, mamba_norm_before_gate=True),
        dict(groups=2, gated_norm="before_gate", proj_multipliers=SCALES),
    ),
}


@pytest.mark.parametrize("case", HF.values(), ids=HF)
def test_is_hugging_face(case):
    model, mixer, config, fields = case
    theirs = layer(model, mixer, length=21, **config)
    x = theirs.x_BTD * getattr(theirs.module, "ssm_in_multiplier", 1)
    eps = getattr(getattr(theirs.module, "norm", None), "variance_epsilon", 1e-5)
    f = values("mamba2", d_model=32, **{**OURS, "norm_eps": eps, **fields})
    ours = Module(f, Dims(32, 32))
    ours.load_state_dict({
        name.replace("conv1d.", "conv.").replace("norm.", "gate_norm."): t.squeeze(1) if t.dim() == 3 else t
        for name, t in theirs.weights.items()
    })
    y = ours(x, Tokens.plain(*x.shape[:2]))
    assert (y - theirs.y_BTD).abs().max() <= 5e-5
