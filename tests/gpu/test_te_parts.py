"""Transformer Engine's parts on a GPU: bfloat16 and FP8 against the reference, and in a whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from on_gpu import NEEDS_GPU, error, replayed
from small_models import graph, shaken

pytest.importorskip("transformer_engine", reason="needs Transformer Engine")
pytestmark = NEEDS_GPU

from mambadsl.build.model import build  # noqa: E402
from mambadsl.kinds.attend import attend  # noqa: E402
from mambadsl.kinds.fields import Call  # noqa: E402
from mambadsl.kinds.module import KindModule  # noqa: E402
from mambadsl.kinds.norm import Norm, rms_norm  # noqa: E402
from mambadsl.kinds.sublayer import NORM  # noqa: E402
from mambadsl.kinds.tokens import Tokens  # noqa: E402
from mambadsl.kinds.values import Variant  # noqa: E402
from mambadsl.parts.te.attention import make_attention  # noqa: E402
from mambadsl.parts.te.linear import make_linear, make_norm_linear  # noqa: E402
from mambadsl.parts.te.norm import make_rms_norm  # noqa: E402

IN, OUT = 256, 384
PRECISION = {
    "bf16": (dict(), 1e-2),
    "fp8 current": (dict(fp8=True, recipe="current"), 0.1),
    "fp8 block": (dict(fp8=True, recipe="block"), 0.1),
}


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype=torch.bfloat16) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=g, device="cuda") * scale).to(dtype).requires_grad_()


def with_gradients(function, x, *weights, **how):
    y = function(x, *weights, **how)
    weigh = torch.linspace(-1, 1, y.shape[-1], device="cuda")
    wanted = [t for t in (x, *weights, *how.get("norm", torch.nn.Identity()).parameters()) if t is not None]
    return [y, *torch.autograd.grad((y.float() * weigh).sum(), wanted)]


def norm_of(word: str, **of) -> Norm:
    form = NORM.convert(Call(word, {}))
    norm = Norm(Variant(word, form.values.replace(**of)), IN, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        for seed, p in enumerate(norm.parameters()):
            p.copy_(normal(IN, seed=seed, scale=0.3) + 1)
    return norm


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(precision, bias):
    how, bound = PRECISION[precision]
    given = normal(2, 48, IN), normal(OUT, IN, seed=1, scale=IN**-0.5), normal(OUT, seed=2) if bias else None
    found, reference = with_gradients(make_linear(**how), *given), with_gradients(F.linear, *given)
    for ours, theirs in zip(found, reference, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert error(ours, theirs) < bound


NORMS = {
    "rms": dict(word="rmsnorm"),
    "rms, eps": dict(word="rmsnorm", eps=0.5),
    "rms, zero centred": dict(word="rmsnorm", zero_centered=True),
    "layer": dict(word="layernorm"),
}


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("which", NORMS)
def test_norm_linear(precision, which):
    how, bound = PRECISION[precision]
    norm = norm_of(**NORMS[which])
    given = normal(2, 48, IN), normal(OUT, IN, seed=1, scale=IN**-0.5), normal(OUT, seed=2)

    def reference(x, weight, bias, *, norm):
        return F.linear(norm(x), weight, bias)

    found = with_gradients(make_norm_linear(**how), *given, norm=norm)
    for ours, theirs in zip(found, with_gradients(reference, *given, norm=norm), strict=True):
        assert error(ours, theirs) < bound


def test_a_float32_stream_is_normed_in_float32():
    norm, weight = norm_of("rmsnorm"), normal(OUT, IN, seed=1)
    x = normal(2, 48, IN, dtype=torch.float32)
    ours = make_norm_linear()(x, weight, None, norm=norm)
    assert error(ours, F.linear(norm(x).bfloat16(), weight)) < 1e-2


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_rms_norm(zero_centered, stream, compiled):
    x, weight = normal(3, 50, IN, dtype=stream), normal(IN, seed=1)
    part = torch.compile(make_rms_norm(), fullgraph=True) if compiled else make_rms_norm()
    how = dict(eps=0.3, zero_centered=zero_centered)
    for ours, theirs in zip(
        with_gradients(part, x, weight, **how), with_gradients(rms_norm, x, weight, **how), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) < 1e-2
    assert error(part(x, None, eps=0.3), rms_norm(x, None, eps=0.3)) < 1e-2


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 2, 64), (4, 4, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention(window, heads, kv_heads, head_dim, packed):
    length = 600
    tokens = Tokens.plain(2, length, device="cuda")
    if packed:
        tokens = Tokens.packed((tokens.positions_BT // 170).int())
    given = [normal(2, length, h, head_dim, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads))]
    wide = [t.detach().float().requires_grad_() for t in given]
    found = []
    for function, qkv in ((make_attention(), given), (attend, wide)):
        y = function(*qkv, tokens, tokens, scale=0.2, window=window, softcap=None)
        weigh = torch.linspace(-1, 1, length, device="cuda")[None, :, None, None]
        found.append([y, *torch.autograd.grad((y.float() * weigh).sum(), qkv)])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) < 1.5e-2


def test_attention_of_views_of_one_buffer():
    """As the layer gives them without rope: q, k and v are slices of one projection."""
    tokens = Tokens.plain(2, 600, device="cuda")
    for kv_heads in (4, 2):
        qkv = normal(2, 600, (4 + 2 * kv_heads) * 64).detach()
        q, k, v = (t.unflatten(-1, (-1, 64)) for t in qkv.split((256, kv_heads * 64, kv_heads * 64), -1))
        how = dict(scale=0.2, window=None, softcap=None)
        ours = make_attention()(q, k, v, tokens, tokens, **how)
        assert error(ours, attend(*(t.float() for t in (q, k, v)), tokens, tokens, **how)) < 1.5e-2


@pytest.mark.parametrize("precision", PRECISION)
def test_in_a_cuda_graph(precision):
    how, _ = PRECISION[precision]
    norm, entry, exit_ = norm_of("rmsnorm"), make_norm_linear(**how), make_linear(**how)
    given = [normal(2, 48, IN), normal(OUT, IN, seed=1, scale=IN**-0.5), normal(IN, OUT, seed=2, scale=OUT**-0.5)]

    def run(x, up, down):
        y = exit_(F.silu(entry(x, up, None, norm=norm)), down, None)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, up, down, norm.weight))]

    values = [t.detach() * 1.5 for t in given]
    expected = [t.detach().clone() for t in run(*(t.clone().requires_grad_() for t in values))]
    for ours, eager in zip(replayed(run, given, values), expected, strict=True):
        assert error(ours, eager) < 2e-2


LAYERS = """
layer T = attention(heads=4, kv_heads=2, head_dim=16, rope=rope(theta=100))
layer U = mlp(d_ff=96, act=relu2)
layer V = mlp(d_ff=96, gated=true)
layer X = T(residual=sandwich)
layer Y = U(residual=post)
layer Q = T(in_multiplier=1.25)
parts only_te : te { model.loss = reference }
"""
STACK = "T U V X Y Q T+U"


def whole(parts: str, **settings):
    made = graph(STACK, more=LAYERS, d_model=64, vocab=64, init_std=0.05, **settings)
    return shaken(build(made, dtype="bf16", device="cuda", parts=parts)).train()


def loss_and_gradients(model):
    tokens = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(1)).cuda()
    loss = model.loss(tokens)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, dict(residual_dtype="fp32"), dict(norm="layernorm")], ids=str)
def test_whole_model(settings):
    ours, reference = whole("only_te", **settings), whole("reference", **settings)
    assert list(ours.state_dict()) == list(reference.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in reference.named_modules()]
    assert "te.rms_norm" == ours.assignment.of("model")["norm"].part
    (loss, gradients), (expected, theirs) = loss_and_gradients(ours), loss_and_gradients(reference)
    assert abs(loss.item() - expected.item()) < 0.02 * expected.item()
    for name, gradient in theirs.items():
        assert error(gradients[name], gradient) < 0.1, name


def test_whole_model_in_fp8():
    """Every projection of every layer in FP8; 96 tokens, widths in sixteens."""
    ours, reference = whole("reference"), whole("reference")
    part = make_linear(fp8=True)
    for module in ours.modules():
        if isinstance(module, KindModule):
            module.parts = {slot: part if slot.endswith("_proj") else f for slot, f in module.parts.items()}
    names = list(ours.state_dict())
    (loss, gradients), (expected, theirs) = loss_and_gradients(ours), loss_and_gradients(reference)
    assert names == list(ours.state_dict()) == list(reference.state_dict())
    assert abs(loss.item() - expected.item()) < 0.1 * expected.item()
    for name, gradient in theirs.items():
        assert gradients[name] is not None and gradients[name].isfinite().all(), name
        assert torch.cosine_similarity(gradients[name].flatten().float(), gradient.flatten().float(), 0) > 0.9, name
