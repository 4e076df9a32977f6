"""Transformer Engine's parts without a GPU: how weights are lent, what is handed over, what is refused.

The stand-ins below take the same constructor arguments as `te.Linear` and `te.LayerNormLinear` and compute the
same in float64; that the real ones do is tested in tests/gpu.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kind_values import values
from ragged import REAL, ragged
from torch import nn

from mambadsl.kinds.attend import attend
from mambadsl.kinds.fields import Call, Word
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.norm import Norm, layer_norm, rms_norm
from mambadsl.kinds.residual import RESIDUAL_FORMS
from mambadsl.kinds.sublayer import NORM
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values, Variant
from mambadsl.parts.machine import Machine
from mambadsl.parts.part import Request
from mambadsl.parts.te import accepts, linear
from mambadsl.parts.te import attention as te_attention


class Projection(nn.Module):
    made = 0

    def __init__(self, in_features, out_features, *, bias, params_dtype, device, fuse_wgrad_accumulation, **norm):
        super().__init__()
        type(self).made += 1
        assert device == "meta" and not fuse_wgrad_accumulation
        empty = dict(device=device, dtype=params_dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **empty))
        self.bias = nn.Parameter(torch.empty(out_features, **empty)) if bias else None
        self.form = norm
        if norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(in_features, **empty))
            with_bias = norm["normalization"] == "LayerNorm"
            self.layer_norm_bias = nn.Parameter(torch.empty(in_features, **empty)) if with_bias else None

    def forward(self, x):
        if self.form:
            eps, scale = self.form["eps"], self.layer_norm_weight
            if self.form["normalization"] == "RMSNorm":
                x = rms_norm(x, scale, eps=eps, zero_centered=self.form["zero_centered_gamma"])
            else:
                x = layer_norm(x, scale, self.layer_norm_bias, eps=eps)
        return F.linear(x, self.weight, self.bias)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(linear, "load", lambda: SimpleNamespace(Linear=Projection, LayerNormLinear=Projection))
    monkeypatch.setattr(Projection, "made", 0)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_reach_our_parameters(stand_in, bias):
    x, weight, shift = parameter(3, 5, 16), parameter(8, 16, seed=1), parameter(8, seed=2) if bias else None
    wanted = [t for t in (x, weight, shift) if t is not None]
    part = linear.make_linear()
    found = [function(x, weight, shift) for function in (part, F.linear)]
    gradients = [torch.autograd.grad(y.float().square().sum(), wanted) for y in found]
    torch.testing.assert_close(*found)
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


def norm_of(word: str, **of) -> Norm:
    norm = Norm(NORM.convert(Call(word, {})), 16)
    form = type(norm.norm)(word, norm.norm.values.replace(**of))
    made = Norm(form, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        for seed, p in enumerate(made.parameters()):
            p.copy_(1 + 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(seed)))
    return made


@pytest.mark.parametrize(
    "norm", [norm_of("rmsnorm", eps=0.1), norm_of("rmsnorm", zero_centered=True), norm_of("layernorm")], ids=str
)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_norm_and_projection_in_one(stand_in, norm, stream):
    x, weight, bias = parameter(3, 16).detach().to(stream), parameter(8, 16, seed=1), parameter(8, seed=2)
    wanted = [weight, bias, *norm.parameters()]
    found = []
    for y in (
        linear.make_norm_linear()(x, weight, bias, norm=norm),
        F.linear(norm(x).to(torch.bfloat16), weight, bias),
    ):
        found.append((y, *torch.autograd.grad(y.float().square().sum(), wanted)))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)


def test_weights_are_lent_and_not_kept(stand_in):
    part, weight, x = linear.make_linear(), parameter(8, 16), parameter(2, 16).detach()
    part(x, weight, None)
    part(x, weight, None)
    assert Projection.made == 1
    part(x, parameter(8, 16), None)
    assert Projection.made == 2
    alive = weakref.ref(weight)
    del weight
    gc.collect()
    assert alive() is None


def test_refused_dtypes(stand_in):
    with pytest.raises(ValueError, match="float32 @ torch.float32"):
        linear.make_linear()(torch.zeros(2, 16), torch.zeros(8, 16), None)
    with pytest.raises(ValueError, match="float16 @ torch.bfloat16"):
        linear.make_linear()(torch.zeros(2, 16).half(), parameter(8, 16), None)


def test_fp8_wants_sixteens():
    zeros = torch.zeros(2, 8, 48, dtype=torch.bfloat16)
    linear._check(zeros, parameter(32, 48), True)
    with pytest.raises(ValueError, match="not tokens 14 and output 24"):
        linear._check(zeros[:, :7], parameter(24, 48), True)


def test_attention_hands_over_what_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(te_attention, "load", lambda: None)
    part, tokens = te_attention.make_attention(), ragged()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 10, heads, 16, generator=generator) for heads in (4, 2, 2))
    how = dict(scale=0.3, window=4, softcap=None)
    torch.testing.assert_close(part(q, k, v, tokens, tokens, **how)[REAL], attend(q, k, v, tokens, tokens, **how)[REAL])
    last = Tokens(tokens.positions_BT[:, -1:], tokens.segments_BT[:, -1:])
    torch.testing.assert_close(
        part(q[:, -1:], k, v, last, tokens, **how)[REAL[:, -1:]],
        attend(q[:, -1:], k, v, last, tokens, **how)[REAL[:, -1:]],
    )
    rows = Tokens.plain(4, 10)
    how = dict(scale=0.3, window=None, softcap=2.0)
    torch.testing.assert_close(part(q, k, v, rows, rows, **how), attend(q, k, v, rows, rows, **how))
    with pytest.raises(ValueError, match="bfloat16 or float16, not in torch.float32"):
        part(q, k, v, rows, rows, scale=0.3, window=None, softcap=None)


def test_missing_package_is_an_import_error():
    if __import__("importlib").util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    from mambadsl.parts.te.norm import make_rms_norm

    for make in (linear.make_linear, linear.make_norm_linear, te_attention.make_attention, make_rms_norm):
        with pytest.raises(ImportError, match="transformer_engine"):
            make()


def request(
    slot: str, *, dtype: str = "bf16", norm=None, residual: str = "pre", alone: bool = True, in_multiplier=1,
    adapter: str = "none",
    fp8: bool = False, **fields,
) -> Request:
    sub = Values(
        norm=norm or NORM.convert(Word("rmsnorm")), residual=RESIDUAL_FORMS.convert(Call(residual, {})), input="stream"
    )
    branch = Values(in_multiplier=in_multiplier, out_multiplier=1, adapter=Variant(adapter))
    kind = slot.partition(".")[0]
    given = values(kind, d_model=64, **fields)
    return Request(
        slot, given, Dims(64, 64), sub, branch, alone, dtype, Machine("cuda", "", (9, 0)), Values(fp8=fp8)
    )


def test_accepts_linear():
    assert not list(accepts.linear(request("mlp.up_proj", d_ff=64)))
    assert "TF32" in next(accepts.linear(request("mlp.up_proj", dtype="fp32")))
    assert not list(accepts.linear(request("mlp.up_proj", d_ff=24)))
    assert not list(accepts.linear(request("mlp.up_proj", d_ff=24, gated=True, fp8=True))), "48 wide: gate and up"
    assert "up_proj.weight is (24, 64)" in next(accepts.linear(request("mlp.up_proj", d_ff=24, fp8=True)))
    assert "down_proj.weight is (64, 24)" in next(accepts.linear(request("mlp.down_proj", d_ff=24, fp8=True)))
    # 2 * 64 + 2 * 16 + heads: one dt for each head.
    mamba = dict(heads=8, head_dim=8, d_state=16, groups=1)
    assert "in_proj.weight" in next(accepts.linear(request("mamba2.in_proj", fp8=True, **mamba)))
    assert not list(accepts.linear(request("mamba2.out_proj", fp8=True, **mamba)))


@pytest.mark.parametrize(
    "how, reason",
    [
        (dict(alone=False), "share one norm"),
        (dict(residual="post"), "residual = post"),
        (dict(residual="normed"), "residual = normed"),
        (dict(in_multiplier=2), "in_multiplier = 2"),
        (dict(adapter="lora"), "an adapter"),
        (dict(norm=NORM.convert(Word("none"))), "no norm"),
        (dict(norm=norm_of("rmsnorm", weight=False).norm), "all its weights"),
        (dict(norm=norm_of("layernorm", bias=False).norm), "all its weights"),
    ],
)
def test_norm_linear_needs_the_norm_to_itself(how, reason):
    assert not list(accepts.norm_linear(request("mlp.up_proj")))
    assert not list(accepts.norm_linear(request("mlp.up_proj", residual="sandwich")))
    (found,) = accepts.norm_linear(request("mlp.up_proj", **how))
    assert reason in found


def test_accepts_attention():
    assert not list(accepts.attention(request("attention.core", head_dim=64, window=128)))
    assert len(list(accepts.attention(request("attention.core", head_dim=20, softcap=30)))) == 2
