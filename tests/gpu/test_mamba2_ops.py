"""Convolution, scan and core of Mamba-2, by our kernels and by those of mamba_ssm and causal_conv1d, and the selective
scan, equal the definitions on an NVIDIA GPU, forward and backward.

Each result is held to the definition in float32, on the same (rounded) inputs, by the relative size of the
difference: below 4e-3 in fp32 (the kernels multiply in TF32, by truncation, twice over), 2e-2 in bf16.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from kind_values import module

from mambadsl.kinds import conv as conv_definition
from mambadsl.kinds.mamba1 import module as mamba1
from mambadsl.kinds.mamba2 import module as mamba2
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.tokens import Tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BY = ("triton", "mamba_ssm")
#: Set by the fixture `by`.
make_core = make_scan = make_conv = None

B, T, H = 2, 300, 16
LIMIT = {torch.float32: 4e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(LIMIT), ids=["fp32", "bf16"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
#: head_dim, d_state, groups, chunk
SIZES = [(64, 128, 1, 128), (64, 128, 8, 64), (80, 64, 2, 64)]


@pytest.fixture(autouse=True, params=BY)
def by(request, monkeypatch):
    """Whose kernels: the makers of this file are theirs."""
    from mambadsl.parts.triton import conv, core, scan

    make_conv = conv.make_conv
    if request.param == "mamba_ssm":
        pytest.importorskip("causal_conv1d")
        from mambadsl.parts.causal_conv1d.conv import make_conv
        from mambadsl.parts.mamba_ssm import load

        try:
            load.load()
        except ImportError as reason:
            pytest.skip(f"mamba_ssm: {reason}")
    made = dict(make_core=core.make_core, make_scan=scan.make_scan)
    for name, make in {**{n: partial(m, by=request.param) for n, m in made.items()}, "make_conv": make_conv}.items():
        monkeypatch.setitem(globals(), name, make)
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def segments() -> torch.Tensor:
    """Documents that end inside chunks, at their ends, and padding."""
    rows = [[0] * 100 + [1] * 28 + [2] * 172, [0] * 3 + [1] * 253 + [2] * 30 + [-1] * 14]
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def near(mine, theirs, dtype):
    """Prints and checks the largest relative error."""
    errors = []
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        errors.append(float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6)))
    print("errors", *(f"{e:.1e}" for e in errors))
    assert max(errors) < LIMIT[dtype], errors


def run(function, tensors, *, wide: bool):
    """The outputs, and the gradients of a fixed random combination of them; `wide`: all in float32."""
    leaves = [t if t is None else (t.float() if wide else t).detach().clone().requires_grad_() for t in tensors]
    outs = [out for out in function(*leaves) if out is not None]
    generator = torch.Generator("cuda").manual_seed(7)
    sum((o.float() * torch.randn(o.shape, generator=generator, device="cuda")).sum() for o in outs).backward()
    return [*outs, *(t.grad for t in leaves if t is not None)]


def compare(function, definition, tensors, dtype):
    near(run(function, tensors, wide=False), run(definition, tensors, wide=True), dtype)


@PACKED
@DTYPES
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("K, bias", [(4, True), (2, False)])
def test_conv(K, bias, state, dtype, packed):
    C = 64
    wide = torch.randn(B, T, 2 * C, device="cuda", dtype=dtype)
    tensors = [
        wide, torch.randn(C, K, device="cuda", dtype=dtype),
        torch.randn(C, device="cuda", dtype=dtype) if bias else None,
        torch.randn(B, C, K - 1, device="cuda", dtype=dtype) if state else None,
    ]
    rows = Rows.of(Tokens.packed(segments())) if packed else Rows()

    def call(conv):
        return lambda x, w, b, s: conv(
            x[..., 32 : 32 + C], w, b, segments_BT=rows.segments_BT, lengths_B=rows.lengths_B, state_BCJ=s
        )

    compare(call(make_conv()), call(conv_definition.causal_conv), tensors, dtype)


@PACKED
@DTYPES
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("P, N, G, chunk", SIZES)
def test_scan(P, N, G, chunk, state, dtype, packed):
    rows = Rows.of(Tokens.packed(segments())) if packed else Rows()
    dt = torch.rand(B, T, H, device="cuda") * 0.2
    tensors = [
        torch.randn(B, T, H, P, device="cuda", dtype=dtype), dt, -torch.rand(H, device="cuda") * 4 - 0.1,
        torch.randn(B, T, G, N, device="cuda", dtype=dtype), torch.randn(B, T, G, N, device="cuda", dtype=dtype),
        torch.randn(H, device="cuda"), torch.randn(B, H, P, N, device="cuda") if state else None,
    ]

    def call(scan):
        # Padding takes no step, whatever its dt.
        return lambda x, dt, *t: scan(
            x, rows.without_padding(dt), *t[:-1], chunk=chunk, segments_BT=rows.segments_BT, state_BHPN=t[-1]
        )

    compare(call(make_scan(chunk=chunk)), call(mamba2.ssd), tensors, dtype)


def layer(dtype, *, P=64, N=128, G=1, d_model=128, **fields):
    made = module("mamba2", d_model=d_model, heads=H, head_dim=P, d_state=N, groups=G, **fields).cuda().to(dtype)
    with torch.no_grad():
        made.A_log.copy_(torch.rand(H).mul(15).add(1).log())
        made.dt_bias.sub_(3)
    return made


def core_results(core, layer, zxbcdt, rows):
    """out, and the gradients of the input and of every weight that the core reads."""
    leaf = zxbcdt.detach().clone().requires_grad_()
    weights = [p for name, p in layer.named_parameters() if "_proj" not in name]
    for p in weights:
        p.grad = None
    out = core(layer, leaf, rows, None)
    dout = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(7), device="cuda")
    (out.float() * dout).sum().backward()
    return [out, leaf.grad, *(p.grad for p in weights)]


def check_core(dtype, *, packed, chunk, keep, **fields):
    mine = layer(dtype, **fields)
    wide = copy.deepcopy(mine).float()
    zxbcdt = torch.randn(B, T, mine.in_proj.weight.shape[0], device="cuda", dtype=dtype)
    rows = Rows.of(Tokens.packed(segments())) if packed else Rows()
    got = core_results(make_core(chunk=chunk, keep=keep), mine, zxbcdt, rows)
    near(got, core_results(mamba2.core, wide, zxbcdt.float(), rows), dtype)


@PACKED
@DTYPES
@pytest.mark.parametrize("P, N, G, chunk", SIZES)
def test_core_sizes(P, N, G, chunk, dtype, packed):
    check_core(dtype, packed=packed, chunk=chunk, keep="states", P=P, N=N, G=G)


@PACKED
@DTYPES
@pytest.mark.parametrize("keep", ["all", "none"])
@pytest.mark.parametrize("fields", [
    dict(gated_norm="before_gate", norm_groups=4), dict(gated_norm="none", conv_bias=False, dt_limit=(0.01, 0.2)),
], ids=["before_gate", "no norm"])
def test_core_forms(fields, keep, dtype, packed):
    check_core(dtype, packed=packed, chunk=128, keep=keep, **fields)


def test_core_is_the_same_whatever_it_keeps():
    mine = layer(torch.bfloat16)
    zxbcdt = torch.randn(B, T, mine.in_proj.weight.shape[0], device="cuda", dtype=torch.bfloat16)
    first, *others = (core_results(make_core(keep=keep), mine, zxbcdt, Rows()) for keep in ("all", "states", "none"))
    for other in others:
        near(other, first, torch.bfloat16)
        assert torch.equal(first[0], other[0])


def test_step_sizes_are_written_into_place():
    """Rows that the convolution cannot read in place (width not a multiple of 8) go through a copy."""
    mine = module("mamba2", d_model=128, heads=4, head_dim=64, d_state=128).cuda()
    zxbcdt = torch.randn(B, T, mine.in_proj.weight.shape[0], device="cuda")
    assert zxbcdt.shape[-1] % 8
    got = core_results(make_core(), mine, zxbcdt, Rows())
    near(got, core_results(mamba2.core, mine, zxbcdt, Rows()), torch.float32)


def test_prompts_in_pieces():
    mine = layer(torch.float32)
    reference = copy.deepcopy(mine)
    mine.parts |= {"core": make_core(), "conv": make_conv(), "scan": make_scan()}
    states = [m.init_state(B, dtype=torch.float32, device="cuda") for m in (mine, reference)]
    x = torch.randn(B, T, 128, device="cuda")
    with torch.no_grad():
        for lo, hi in ((0, 120), (120, 123), (123, T)):
            tokens = Tokens.packed(segments()[:, lo:hi])
            outs = [m(x[:, lo:hi], tokens, s) for m, s in zip((mine, reference), states)]
            near(outs[:1], outs[1:], torch.float32)
    near([states[0][n] for n in ("conv", "ssm")], [states[1][n] for n in ("conv", "ssm")], torch.float32)


@PACKED
def test_layer_compiles_whole(packed):
    eager = layer(torch.bfloat16)
    eager.parts["core"] = make_core()
    whole = torch.compile(eager, fullgraph=True)
    tokens = Tokens.packed(segments()) if packed else Tokens.plain(B, T, device="cuda")
    x = torch.randn(B, T, 128, device="cuda", dtype=torch.bfloat16)

    def both(call):
        leaf = x.clone().requires_grad_()
        eager.zero_grad()
        y = call(leaf, tokens)
        y.float().square().sum().backward()
        return [y, leaf.grad, *(p.grad.clone() for p in eager.parameters())]

    near(both(whole), both(eager), torch.bfloat16)


@pytest.mark.parametrize("keep", ["states", "none"])
def test_core_in_a_cuda_graph(keep):
    mine = layer(torch.bfloat16)
    core, weights = make_core(keep=keep), [p for n, p in mine.named_parameters() if "_proj" not in n]
    shape = B, T, mine.in_proj.weight.shape[0]
    leaf = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        return [o for o in torch.autograd.grad(core(mine, leaf, Rows(), None).float().square().sum(), [leaf, *weights])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn(shape, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    near(captured, step(), torch.bfloat16)


@PACKED
@DTYPES
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_selective_scan(state, dtype, packed, by):
    if by != "mamba_ssm":
        pytest.skip("the selective scan is mamba_ssm's")
    pytest.importorskip("selective_scan_cuda")
    from mambadsl.parts.mamba_ssm.selective import make_selective_scan

    I, N = 64, 16
    rows = Rows.of(Tokens.packed(segments())) if packed else Rows()
    tensors = [
        torch.randn(B, T, I, device="cuda", dtype=dtype),
        rows.without_padding(torch.rand(B, T, I, device="cuda") * 0.2),
        -torch.arange(1, N + 1, device="cuda").float().repeat(I, 1),
        torch.randn(B, T, N, device="cuda", dtype=dtype), torch.randn(B, T, N, device="cuda", dtype=dtype),
        torch.randn(I, device="cuda"), torch.randn(B, I, N, device="cuda") if state else None,
    ]

    def call(scan):
        return lambda *t: scan(*t[:-1], chunk=64, segments_BT=rows.segments_BT, state_BIN=t[-1])

    compare(call(make_selective_scan()), call(mamba1.selective_scan), tensors, dtype)
