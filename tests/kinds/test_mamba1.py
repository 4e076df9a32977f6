"""Mamba-1 against its definition, against itself cut otherwise, and against Hugging Face's layers."""

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
from mambadsl.kinds.mamba1 import module as mamba1
from mambadsl.kinds.mamba1.kind import KIND
from mambadsl.kinds.mamba1.module import Module, selective_scan
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import NONE, Values, Variant

torch.set_num_threads(1)


def norm(form: str, eps: float = 1e-6) -> Variant:
    return Variant(form, Values(eps=eps))


SMALL = dict(d_model=8, d_inner=12, d_state=3, dt_rank=4, chunk=4)
CASES = {
    "default": dict(SMALL),
    "learned norms": dict(SMALL, dt_bc_norm=norm("learned", 1e-3), bias=True),
    "weightless norms": dict(SMALL, dt_bc_norm=norm("weightless", 1e-3), conv_bias=False),
    "no convolution": dict(SMALL, d_conv=1, bias=True),
    "long convolution": dict(SMALL, d_conv=7, chunk=100),
    "heads": dict(SMALL, heads=3),
    "heads with norms": dict(SMALL, heads=2, dt_bc_norm=norm("learned", 1e-3)),
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
BOTH = pytest.mark.parametrize("tokens", laws.TOKENS.values(), ids=laws.TOKENS)


def made(**fields) -> Module:
    return module("mamba1", **fields)


@EACH
@BOTH
def test_is_naive(fields, tokens):
    laws.is_naive(made(**fields), tokens)


@settings(max_examples=15, deadline=None)
@given(
    d_inner=st.integers(1, 9), d_state=st.integers(1, 5), d_conv=st.integers(1, 5), dt_rank=st.integers(2, 5),
    chunk=st.integers(1, 20), conv_bias=st.booleans(), bias=st.booleans(), length=st.integers(1, 20),
    dt_bc_norm=st.sampled_from([NONE, norm("learned", 0.1), norm("weightless", 0.1)]),
)
def test_is_naive_for_any_fields(length, **fields):
    laws.is_naive(made(d_model=6, **fields), Tokens.plain(2, length))


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
    assert list(Module.REFERENCE) == [slot.name for slot in KIND.slots]


def scan_inputs(B=2, T=150, D=4, N=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dt, A, b, c, d = (
        torch.randn(shape, generator=generator)
        for shape in ((B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), (D,))
    )
    return x, F.softplus(dt), -A.exp(), b, c, d


def test_chunk_does_not_matter():
    segments = torch.arange(150, dtype=torch.int32).expand(2, -1) // 37
    for documents in (None, segments):
        y, state = selective_scan(*scan_inputs(), chunk=1, segments_BT=documents)
        for chunk in (2, 7, 64, 1000):
            y_chunk, state_chunk = selective_scan(*scan_inputs(), chunk=chunk, segments_BT=documents)
            laws.same(y_chunk, y)
            laws.same(state_chunk, state)


def test_blocks_do_not_matter(monkeypatch):
    """Many blocks, computed again in the backward pass, give what one block gives, gradients too."""
    def results():
        tensors = [t.requires_grad_() for t in scan_inputs()]
        y, state = selective_scan(*tensors, chunk=8)
        return [y, state, *torch.autograd.grad(y.square().sum() + state.sum(), tensors)]

    one_block = results()
    monkeypatch.setattr(mamba1, "BLOCK_ELEMENTS", 2 * 4 * 3 * 8 * 3)
    for many, one in zip(results(), one_block):
        laws.same(many, one)


def test_memory_is_bounded(monkeypatch):
    """With many blocks, what is kept for the backward pass is far less than a state for each token."""
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    monkeypatch.setattr(mamba1, "BLOCK_ELEMENTS", 32 * 8 * 16 * 4)
    x, *others = scan_inputs(B=1, T=1024, D=32, N=8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = selective_scan(x.requires_grad_(), *others, chunk=16)
    assert 0 < sum(kept.values()) < 0.7 * 1024 * 32 * 8


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dt, A", [(1e4, 1e38), (1e4, 1e-30), (0, 1e38), (1e-30, 1e4), (30, 1e3)])
def test_extreme_decays_are_finite(dt, A, packed):
    x, _, _, b, c, d = scan_inputs()
    dt = torch.full((2, 150, 4), float(dt), requires_grad=True)
    A = torch.full((4, 3), -A, requires_grad=True)
    x.requires_grad_()
    segments = torch.arange(150, dtype=torch.int32).expand(2, -1) // 37 if packed else None
    y, state = selective_scan(x, dt, A, b, c, d, chunk=16, segments_BT=segments)
    (y.sum() + state.sum()).backward()
    for tensor in (y, state, x.grad, dt.grad, A.grad):
        assert tensor.isfinite().all()


MAMBA = dict(state_size=8, num_hidden_layers=1)
JAMBA = dict(
    intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8,
    mamba_d_conv=3, mamba_expand=2,
)
#: name: (model class, layer class, settings there, our fields)
HF = {
    "mamba": ("Mamba", "MambaMixer", MAMBA, {}),
    "mamba bias": (
        "Mamba", "MambaMixer", dict(MAMBA, use_bias=True, use_conv_bias=False, time_step_rank=3),
        dict(bias=True, conv_bias=False, dt_rank=3),
    ),
    "falcon_mamba": (
        "FalconMamba", "FalconMambaMixer", dict(MAMBA, mixer_rms_eps=1e-3),
        dict(dt_bc_norm=norm("weightless", 1e-3)),
    ),
    "jamba": ("Jamba", "JambaMambaMixer", JAMBA, dict(dt_bc_norm=norm("learned"), d_conv=3)),
    "zamba": (
        "Zamba", "ZambaMambaMixer", dict(num_hidden_layers=1, layers_block_type=["linear_attention"], mamba_d_state=8),
        dict(heads=2),
    ),
}
OUR_NAMES = {
    "conv1d.": "conv.", "dt_layernorm.": "dt_norm.", "b_layernorm.": "b_norm.", "c_layernorm.": "c_norm.",
    "x_proj_": "x_proj.", "dt_proj_": "dt_proj.",
}


def heads_apart(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Zamba's rows of in_proj are x and z in turn; other weights have heads as an axis of their own."""
    if name == "in_proj.weight":
        return torch.cat([tensor[0::2], tensor[1::2]])
    own = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
    return tensor.flatten(0, 1) if name in own else tensor


@pytest.mark.parametrize("case", HF.values(), ids=HF)
def test_is_hugging_face(case):
    model, mixer, config, fields = case
    theirs = layer(model, mixer, length=21, **config)
    weights = {}
    for name, tensor in theirs.weights.items():
        if fields.get("heads"):
            tensor = heads_apart(name, tensor)
        for prefix, ours in OUR_NAMES.items():
            name = name.replace(prefix, ours)
        weights[name] = tensor.squeeze(1) if tensor.dim() == 3 else tensor
    ours = Module(values("mamba1", d_model=32, d_inner=64, d_state=8, **fields), Dims(32, 32))
    ours.load_state_dict(weights)
    y = ours(theirs.x_BTD, Tokens.plain(*theirs.x_BTD.shape[:2]))
    assert (y - theirs.y_BTD).abs().max() <= 5e-5
