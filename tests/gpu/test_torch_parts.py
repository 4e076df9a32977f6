"""torch's kernels on a GPU against the reference in float32: attention in all its forms, experts."""

from __future__ import annotations

import pytest
import torch
from on_gpu import NEEDS_GPU, error, replayed
from torch.nn.attention import SDPBackend

from mambadsl.kinds.attend import attend
from mambadsl.kinds.moe.module import run_experts
from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.torch import attention
from mambadsl.parts.torch.attention import make_attention
from mambadsl.parts.torch.experts import make_experts

pytestmark = NEEDS_GPU

#: Longer than `attention.SHORT`, and no multiple of a block.
LONG, BATCH = 700, 2
BOUND = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=str)


def qkv(length: int = LONG, *, heads: int = 8, kv_heads: int = 2, head_dim: int = 64, dtype=torch.bfloat16, keys=None):
    g = torch.Generator("cuda").manual_seed(length)
    shapes = [(BATCH, length, heads, head_dim)] + 2 * [(BATCH, keys or length, kv_heads, head_dim)]
    return [torch.randn(s, generator=g, device="cuda").to(dtype).requires_grad_() for s in shapes]


def documents(length: int = LONG, *, seed: int = 0) -> torch.Tensor:
    """Segments of every length, some padding at both ends; the second row is one document."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.rand(length, generator=g) < 0.02
    row = starts.cumsum(0).int()
    row[:3], row[-9:] = -1, -1
    return torch.stack((row, torch.zeros_like(row))).cuda()


def results(function, q, k, v, queries, keys, **how) -> list[torch.Tensor]:
    """Output and gradients, with nothing flowing through padding."""
    y = function(q, k, v, queries, keys, scale=0.11, **how)
    if queries.segments_BT is not None:
        y = torch.where((queries.segments_BT >= 0)[..., None, None], y, 0)
    weigh = torch.linspace(-1, 1, y.shape[1], device="cuda")[None, :, None, None]
    return [y, *torch.autograd.grad((y.float() * weigh).sum(), (q, k, v))]


def check(part, given, queries, keys, **how) -> None:
    """Against the reference on the same values in float32; padding's own gradients do not count."""
    wide = [t.detach().float().requires_grad_() for t in given]
    found, reference = results(part, *given, queries, keys, **how), results(attend, *wide, queries, keys, **how)
    for name, ours, theirs in zip(("y", "dq", "dk", "dv"), found, reference, strict=True):
        assert ours.dtype == given[0].dtype
        assert error(ours, theirs) < BOUND[given[0].dtype], name


FORMS = {
    "plain": dict(window=None, softcap=None),
    "window": dict(window=130, softcap=None),
    "softcap": dict(window=None, softcap=5.0),
    "both": dict(window=200, softcap=5.0),
}


@DTYPES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [40, LONG])
def test_forms(form, packed, length, dtype):
    tokens = Tokens.packed(documents(length)) if packed else Tokens.plain(BATCH, length, device="cuda")
    check(make_attention(), qkv(length, dtype=dtype), tokens, tokens, **FORMS[form])


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 128), (8, 1, 64), (4, 2, 80), (2, 2, 256)])
@pytest.mark.parametrize("packed", [False, True])
def test_heads(heads, kv_heads, head_dim, packed):
    tokens = Tokens.packed(documents()) if packed else Tokens.plain(BATCH, LONG, device="cuda")
    given = qkv(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    check(make_attention(), given, tokens, tokens, window=None, softcap=None)


@DTYPES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("new", [1, 100])
def test_a_past(form, new, dtype):
    segments = documents()
    keys = Tokens.packed(segments)
    queries = Tokens(keys.positions_BT[:, -new - 9 : -9], segments[:, -new - 9 : -9])
    check(make_attention(), qkv(new, keys=LONG, dtype=dtype), queries, keys, **FORMS[form])


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_backends(backend):
    tokens = Tokens.plain(BATCH, LONG, device="cuda")
    check(make_attention(backend=backend), qkv(), tokens, tokens, window=None, softcap=None)


def test_auto_takes_cudnn():
    """On a Hopper GPU, for bfloat16 heads that share keys."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is preferred from Hopper on")
    q, k, v = (t.transpose(1, 2) for t in qkv())
    order = [*attention.BACKENDS["auto"], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with attention._preferring(order, q):
        chosen = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=0.11, enable_gqa=True)
    assert SDPBackend(chosen) == SDPBackend.CUDNN_ATTENTION


def test_packed_equals_separate():
    segments = documents()[:1].expand(BATCH, -1).contiguous()
    tokens, given = Tokens.packed(segments), qkv()
    part = make_attention()
    packed = part(*given, tokens, tokens, scale=0.11, window=None, softcap=None)
    for number in segments[0].unique().tolist()[1:]:
        place = segments[0] == number
        one = Tokens.plain(BATCH, int(place.sum()), device="cuda")
        alone = part(*(t[:, place] for t in given), one, one, scale=0.11, window=None, softcap=None)
        assert error(packed[:, place], alone) < 1e-2


def test_no_scores_in_memory():
    """8,192 packed tokens with a softcap: forward and backward stay below half of one [H, T, T] of bfloat16."""
    length = 8192
    tokens, given = Tokens.packed(documents(length)), qkv(length)
    part = make_attention()
    results(part, *given, tokens, tokens, window=None, softcap=5.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(part, *given, tokens, tokens, window=None, softcap=5.0)
    assert torch.cuda.max_memory_allocated() - before < 8 * length * length


@pytest.mark.parametrize("form", ["plain", "both"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [40, LONG])
def test_in_a_cuda_graph(form, packed, length):
    """Replayed with other values and other documents than it was captured with."""
    part, given = make_attention(), qkv(length)
    one, other = documents(length, seed=1), documents(length, seed=2)

    def run(q, k, v, segments, positions):
        tokens = Tokens(positions, segments if packed else None)
        return results(part, q, k, v, tokens, tokens, **FORMS[form])

    plain = Tokens.plain(BATCH, length, device="cuda").positions_BT
    before, after = (
        [segments, Tokens.packed(segments).positions_BT if packed else plain.contiguous()] for segments in (one, other)
    )
    values = [t.detach().flip(1) for t in given]
    expected = [t.clone() for t in run(*(t.clone().requires_grad_() for t in values), *after)]
    for ours, eager in zip(replayed(run, [*given, *before], [*values, *after]), expected, strict=True):
        assert error(ours, eager) < 1e-3


@pytest.mark.parametrize("form", ["plain", "both"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_whole(form, packed):
    """torch.compile(fullgraph=True) with its own code generator, rotations around the attention fused or not."""
    tokens = Tokens.packed(documents()) if packed else Tokens.plain(BATCH, LONG, device="cuda")
    part = make_attention()

    def layer(q, k, v, queries, keys, **how):
        return part(q * 1.5, k * 0.5, v, queries, queries, **how) * 2

    def reference(q, k, v, queries, keys, **how):
        return attend(q * 1.5, k * 0.5, v, queries, queries, **how) * 2

    given = qkv()
    wide = [t.detach().float().requires_grad_() for t in given]
    found = results(torch.compile(layer, fullgraph=True), *given, tokens, tokens, **FORMS[form])
    for ours, theirs in zip(found, results(reference, *wide, tokens, tokens, **FORMS[form]), strict=True):
        assert error(ours, theirs) < BOUND[torch.bfloat16]


def experts_case(*, tokens: int, gated: bool, experts: int = 16, width: int = 256, hidden: int = 128, top_k: int = 4):
    g = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda") * shape[-1] ** -0.5

    # The last three experts get nothing.
    index = torch.rand(tokens, experts - 3, generator=g, device="cuda").argsort(1)[:, :top_k]
    weight = torch.rand(tokens, top_k, generator=g, device="cuda")
    x, up = normal(tokens, width) * 16, normal(experts, hidden * (1 + gated), width)
    x, up, down = (t.bfloat16() for t in (x, up, normal(experts, width, hidden)))
    return [t.requires_grad_() if t.is_floating_point() else t for t in (x, index, weight, up, down)]


def experts_results(function, x, index, weight, up, down, *, gated: bool):
    y = function(x, index, weight, up, down, act="silu", gated=gated)
    weigh = torch.linspace(-1, 1, y.shape[1], device="cuda")
    return [y, *torch.autograd.grad((y.float() * weigh).sum(), (x, weight, up, down))]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("compiled", [False, True])
def test_experts(gated, tokens, compiled):
    case = experts_case(tokens=tokens, gated=gated)
    part = torch.compile(make_experts(), fullgraph=True) if compiled else make_experts()
    wide = [t.detach().float().requires_grad_() if t.is_floating_point() else t for t in case]
    found = experts_results(part, *case, gated=gated)
    for ours, reference in zip(found, experts_results(run_experts, *wide, gated=gated), strict=True):
        assert error(ours, reference) < 2e-2
    assert not found[3][-3:].any() and not found[4][-3:].any(), "experts without tokens have a gradient"


def test_experts_in_a_cuda_graph():
    """Replayed with other tokens and another share of them for each expert."""
    case, other = experts_case(tokens=1000, gated=True), experts_case(tokens=1001, gated=True)
    other = [t.detach()[:1000].contiguous() for t in other]

    def run(*given):
        return experts_results(make_experts(), *given, gated=True)

    expected = [t.clone() for t in run(*(t.clone().requires_grad_() if t.is_floating_point() else t for t in other))]
    for ours, eager in zip(replayed(run, case, other), expected, strict=True):
        assert error(ours, eager) < 1e-3
