"""Our Triton convolution on a GPU: half precision against the float32 definition, strides, states, documents, large
offsets, equal bits, torch.compile and CUDA graphs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

#: Relative error of norms against float32.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def near(found, truth, *, tolerance):
    error = (found.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-20)
    assert found.shape == truth.shape and error < tolerance, f"relative error {float(error):.2e}"


def documents(batch, time):
    """Numbers of packed documents, one of which comes twice in a row, and real lengths."""
    segments_BT = ((torch.rand(batch, time, device="cuda") < 0.05).cumsum(1) % 3).int()
    lengths_B = torch.randint(1, time + 1, (batch,), device="cuda")
    last_B1 = segments_BT.gather(1, lengths_B[:, None] - 1)
    padding_BT = torch.arange(time, device="cuda") >= lengths_B[:, None]
    return dict(segments_BT=torch.where(padding_BT, last_B1, segments_BT), lengths_B=lengths_B)


def case(batch, time, channels, K, *, before=0, after=0, bias=True, state=False, dtype=torch.bfloat16):
    def random(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    return (
        random(batch, time, before + channels + after), random(channels, K), random(channels) if bias else None,
        random(batch, channels, K - 1) if state else None,
    )


def results(f, inputs, *, before=0, **rows):
    """y, the state, and the gradients of a random combination of both."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    wide, weight, bias, state = leaves
    y, after = f(wide[..., before : before + weight.shape[0]], weight, bias, state_BCJ=state, **rows)
    outs = [y] if after is None else [y, after]
    generator = torch.Generator("cuda").manual_seed(1)
    douts = [torch.randn(t.shape, generator=generator, device="cuda").to(t.dtype) for t in outs]
    return [*outs, *torch.autograd.grad(outs, [t for t in leaves if t is not None], douts)]


def held_to_the_definition(inputs, *, mine=None, definition=None, **how):
    from mambadsl.kinds.conv import causal_conv
    from mambadsl.parts.triton.conv import make_conv

    dtype = inputs[0].dtype
    found = results(mine or make_conv(), inputs, **how)
    truth = results(definition or causal_conv, [None if t is None else t.float() for t in inputs], **how)
    for got, wanted in zip(found, truth, strict=True):
        assert got.dtype == dtype
        near(got, wanted, tolerance=CLOSE[dtype])


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K", [2, 3, 4, 5, 8])
def test_equals_the_definition(K, bias, packed, state):
    inputs = case(2, 517, 384, K, before=8, after=16, bias=bias, state=state)
    held_to_the_definition(inputs, before=8, **(documents(2, 517) if packed else {}))


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("batch, time, channels, before, after", [
    (2, 4096, 4352, 4096, 64), (2, 4096, 6144, 4096, 64), (1, 1, 4352, 0, 0), (3, 2, 16, 0, 0), (5, 333, 37, 3, 2),
    (64, 128, 256, 0, 0), (1, 20000, 8, 1, 0),
])
def test_any_shape(batch, time, channels, before, after, dtype):
    inputs = case(batch, time, channels, 4, before=before, after=after, state=True, dtype=dtype)
    held_to_the_definition(inputs, before=before)
    held_to_the_definition(inputs, before=before, **documents(batch, time))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("K, state", [(3, False), (3, True), (7, True)])
def test_without_silu(K, state, packed):
    from mambadsl.kinds.conv import plain_conv
    from mambadsl.parts.triton.conv import make_plain_conv

    inputs = case(2, 517, 384, K, before=8, after=16, state=state)
    rows = documents(2, 517) if packed else {}
    held_to_the_definition(inputs, mine=make_plain_conv(), definition=plain_conv, before=8, **rows)


def test_large_values_stay_finite():
    from mambadsl.parts.triton import conv

    x, weight, bias, _ = case(1, 64, 32, 4, dtype=torch.float32)
    x *= 1e4
    y = conv.forward(x, weight, bias)
    near(y, results_of_definition(x, weight, bias), tolerance=1e-5)
    dx, flat, _ = conv.backward(torch.ones_like(y), x, weight, bias)
    assert dx.isfinite().all() and flat.isfinite().all()


def results_of_definition(x, weight, bias):
    from mambadsl.kinds.conv import causal_conv

    return causal_conv(x.float(), weight.float(), bias.float())[0]


def test_gradients_go_straight_into_a_wider_buffer_in_equal_bits():
    from mambadsl.parts.triton import conv

    x, weight, bias, _ = case(2, 1000, 512, 4, before=8, after=24)
    dy = torch.randn(2, 1000, 512, device="cuda", dtype=torch.bfloat16)
    wide = torch.full_like(x, 7.0)
    _, flat, _ = conv.backward(dy, x[..., 8:520], weight, bias, dx=wide[..., 8:520])
    assert (wide[..., :8] == 7).all() and (wide[..., 520:] == 7).all()
    again, flat_again, _ = conv.backward(dy, x[..., 8:520], weight, bias)
    assert torch.equal(wide[..., 8:520], again) and torch.equal(flat, flat_again)


def test_rows_beyond_two_billion_elements():
    from mambadsl.parts.triton import conv

    B, T, C = 3, 2**17 + 3, 8192
    x = torch.empty(B, T, C, device="cuda", dtype=torch.bfloat16).normal_()
    _, weight, bias, _ = case(1, 1, C, 4)
    y = conv.forward(x, weight, bias)
    wanted = results_of_definition(x[-1:, -40:], weight, bias)
    near(y[-1:, -37:], wanted[:, 3:], tolerance=6e-3)
    dx, _, _ = conv.backward(y, x, weight, bias)
    leaf = x[-1:, -40:].float().requires_grad_()
    truth, = torch.autograd.grad(results_of_definition(leaf, weight, bias), leaf, y[-1:, -40:].float())
    near(dx[-1:, -37:], truth[:, 3:], tolerance=6e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole(packed):
    from mambadsl.parts.triton.conv import make_conv

    whole = torch.compile(make_conv(), fullgraph=True)
    inputs = case(2, 300, 256, 4, before=8, after=8, state=True)
    held_to_the_definition(inputs, mine=whole, before=8, **(documents(2, 300) if packed else {}))


@pytest.mark.parametrize("packed", [False, True])
def test_in_a_cuda_graph(packed):
    from mambadsl.parts.triton import conv

    x, weight, bias, state = case(2, 700, 640, 4, state=True)
    document_BT = documents(2, 700)["segments_BT"] if packed else None

    def run():
        y = conv.forward(x, weight, bias, document_BT=document_BT, state_BCJ=state)
        return y, *conv.backward(y, x, weight, bias, document_BT=document_BT, state_BCJ=state)

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for t in found:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
