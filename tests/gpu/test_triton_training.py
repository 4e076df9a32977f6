"""Our Triton kernels for training on a GPU: bfloat16 against float32 definitions, strides, large offsets, equal bits,
torch.compile and CUDA graphs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Relative error of norms against float32.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _exact():
    torch.manual_seed(0)
    torch._dynamo.reset()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def near(found, truth, *, tolerance):
    error = (found.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-20)
    assert error < tolerance, f"relative error {float(error):.2e}"


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, device="cuda")).to(dtype)


def held_to(mine, definition, inputs, *, dtype):
    """Result and gradients of `mine` in `dtype` against the definition's in float32."""
    a = [t.to(dtype).requires_grad_() for t in inputs]
    b = [t.detach().float().requires_grad_() for t in a]
    out, truth = mine(*a), definition(*b)
    dout = torch.randn_like(truth)
    near(out, truth, tolerance=CLOSE[dtype])
    for got, wanted in zip(torch.autograd.grad(out, a, dout.to(out.dtype)), torch.autograd.grad(truth, b, dout)):
        near(got, wanted, tolerance=2 * CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "order, gate", [("after_gate", "silu"), ("before_gate", "silu"), ("none", "silu"), ("before_gate", "sigmoid")]
)
@pytest.mark.parametrize(
    "I, groups", [(4096, 1), (4096, 8), (4096, 32), (768, 3), (5376, 1), (8192, 1), (16384, 1), (100, 5)]
)
def test_gate_norm(I, groups, order, gate, dtype):
    from mambadsl.kinds.mamba2.module import gate_norm
    from mambadsl.parts.triton.gate_norm import make_gate_norm

    def call(f):
        def run(wide, y, weight):
            z = wide[..., 8:8 + I]
            # Order none has no weight: a sum of it keeps the gradient's list whole.
            out = f(y, z, None if order == "none" else weight, order=order, groups=groups, eps=1e-5, gate=gate)
            return out if order != "none" else out + 0 * weight
        return run

    inputs = random(2, 301, I + 24), random(2, 301, I), random(I)
    held_to(call(make_gate_norm()), call(gate_norm), inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order, gate", [("after_gate", "silu"), ("before_gate", "sigmoid")])
@pytest.mark.parametrize("I, groups", [(4096, 1), (768, 3), (8192, 1)])
def test_gate_norm_of_channels_of_several_ranks(I, groups, order, gate, dtype):
    """Other rows stand in for other ranks' channels."""
    from mambadsl.kinds.gate_norm import gate_norm
    from mambadsl.parts.triton.gate_norm import make_gate_norm

    def averaged(x):
        return (x + x.flatten().flip(0).view_as(x)) / 2

    def call(f):
        how = dict(order=order, groups=groups, eps=1e-5, gate=gate, averaged=averaged)
        return lambda wide, y, weight: f(y, wide[..., 8:8 + I], weight, **how)

    inputs = random(2, 301, I + 24), random(2, 301, I), random(I)
    held_to(call(make_gate_norm()), call(gate_norm), inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D, zero_centered", [(2048, False), (1000, True), (16384, False), (64, False)])
def test_rms_norm(D, zero_centered, dtype):
    from mambadsl.kinds.norm import rms_norm
    from mambadsl.parts.triton.norm import make_rms_norm

    def call(f):
        return lambda x, w: f(x, w, eps=1e-5, zero_centered=zero_centered)

    held_to(call(make_rms_norm()), call(rms_norm), (random(3, 211, D), random(D)), dtype=dtype)


@pytest.mark.parametrize("D", [2048, 1000])
def test_rms_norm_of_a_wide_stream(D):
    """float32 in, bfloat16 out: the gradient comes back in bfloat16 and leaves in float32."""
    from mambadsl.kinds.norm import rms_norm
    from mambadsl.parts.triton.norm import make_rms_norm

    x, weight, dout = random(3, 211, D), random(D), random(3, 211, D, dtype=torch.bfloat16)

    def results(f, dtype):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = f(*leaves, eps=1e-5, dtype=dtype)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    found, wanted = results(make_rms_norm(), torch.bfloat16), results(rms_norm, torch.float32)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    near(found[0], wanted[0], tolerance=4e-3)
    for mine, theirs in zip(found[1:], wanted[1:]):
        near(mine, theirs, tolerance=1e-5)


@pytest.mark.parametrize("W", [7, 2048, 30720])
def test_column_sums(W):
    from mambadsl.parts.triton.sums import column_sums

    partial = random(531, W)
    near(column_sums(partial), partial.double().sum(0).float(), tolerance=1e-6)
    near(column_sums(partial, torch.bfloat16), partial.double().sum(0).float(), tolerance=4e-3)


def test_norms_read_rows_beyond_two_billion_elements():
    from mambadsl.kinds.mamba2.module import gate_norm
    from mambadsl.parts.triton.gate_norm_kernels import gate_norm_backward, gate_norm_forward

    I, R = 4096, 2**31 // 4096 + 5
    how = dict(order="after_gate", groups=1, eps=1e-5)
    y, z, weight = torch.empty(R, I, device="cuda", dtype=torch.bfloat16).normal_(), None, random(I)
    z = y.roll(1, 0)
    out, rstd = gate_norm_forward(y, z, weight, **how)
    near(out[-8:], gate_norm(y[-8:].float(), z[-8:].float(), weight, **how), tolerance=1e-2)
    dy, dz, _ = gate_norm_backward(out, y, z, weight, rstd, **how)
    leaves = [t[-8:].float().requires_grad_() for t in (y, z)]
    wanted = torch.autograd.grad(gate_norm(*leaves, weight, **how), leaves, out[-8:].float())
    near(dy[-8:], wanted[0], tolerance=1e-2)
    near(dz[-8:], wanted[1], tolerance=1e-2)


def test_equal_inputs_give_equal_bits():
    from mambadsl.parts.triton.cross_entropy import make_loss
    from mambadsl.parts.triton.gate_norm_kernels import gate_norm_backward, gate_norm_forward

    y, z, dout = (random(1000, 4096, dtype=torch.bfloat16) for _ in range(3))
    weight, how = random(4096), dict(order="after_gate", groups=8, eps=1e-5)
    _, rstd = gate_norm_forward(y, z, weight, **how)
    once, twice = (gate_norm_backward(dout, y, z, weight, rstd, **how) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    x, w = random(1000, 256, dtype=torch.bfloat16).requires_grad_(), random(3001, 256, dtype=torch.bfloat16)
    loss, targets = make_loss(chunks=3), torch.randint(-1, 3001, (1000,), device="cuda")
    assert torch.equal(loss(x, w, targets), loss(x, w, targets))


def plain_loss(x, weight, targets, *, multiplier=1.0, softcap=None):
    logits = (x @ weight.T).float() * multiplier
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V, chunks, softcap", [(50288, 2, None), (50277, 4, 30.0), (262144, None, None), (97, 1, 5.0)])
def test_loss(V, chunks, softcap, dtype):
    from mambadsl.parts.triton.cross_entropy import make_loss

    targets = torch.randint(-1, V, (700,), device="cuda")
    how = dict(multiplier=0.7, softcap=softcap)
    # Loss scaling as a float16 run has it: the mean's gradients are below float16's range otherwise.
    scale = 4096.0
    held_to(
        lambda x, w: scale * make_loss(chunks=chunks)(x, w, targets, **how),
        lambda x, w: scale * plain_loss(x, w, targets, **how),
        (random(700, 512), random(V, 512, scale=0.05)), dtype=dtype,
    )


def test_loss_of_a_model_sized_head():
    from mambadsl.parts.triton.cross_entropy import make_loss

    R, V, D = 40960, 65536, 256  # One chunk: more than 2**31 logits.
    x, w = random(R, D, dtype=torch.bfloat16), random(V, D, dtype=torch.bfloat16, scale=0.05)
    targets = torch.randint(0, V, (R,), device="cuda")
    with torch.no_grad():
        one, many = (make_loss(chunks=n)(x, w, targets, multiplier=1.0, softcap=None) for n in (1, None))
    near(one, many, tolerance=1e-6)


@pytest.mark.parametrize("how", ["eager", "compiled", "graph"])
def test_all_three_in_a_step(how):
    """One step with everything: eager, under torch.compile without a graph break, and captured in a CUDA graph."""
    from mambadsl.kinds.mamba2.module import gate_norm
    from mambadsl.kinds.norm import rms_norm
    from mambadsl.parts.triton.cross_entropy import make_loss
    from mambadsl.parts.triton.gate_norm import make_gate_norm
    from mambadsl.parts.triton.norm import make_rms_norm

    V, D = 1000, 256
    targets = torch.randint(-1, V, (2, 64), device="cuda")

    def model(norm, gate, loss):
        def run(x, z, a, b, head):
            x = norm(x, a, eps=1e-5, zero_centered=True)
            x = gate(x, z, b, order="after_gate", groups=4, eps=1e-5)
            return loss(x, head)
        return run

    mine = make_loss(chunks=2)
    ours = model(
        make_rms_norm(), make_gate_norm(), lambda x, w: mine(x, w, targets, multiplier=1.0, softcap=20.0)
    )
    truth = model(
        rms_norm, gate_norm, lambda x, w: plain_loss(x.flatten(0, 1), w, targets.flatten(), softcap=20.0)
    )
    leaves = [random(2, 64, D), random(2, 64, D), random(D), random(D), random(V, D, scale=0.1)]
    leaves = [t.requires_grad_() for t in leaves]
    wanted = [truth(*leaves), *torch.autograd.grad(truth(*leaves), leaves)]
    step = torch.compile(ours, fullgraph=True) if how == "compiled" else ours

    def run(leaves):
        value = step(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    if how != "graph":
        found = run(leaves)
    else:
        # Leaves that only the side stream has seen: autograd remembers the first stream of each.
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(leaves)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            found = run(leaves)
        for t in found:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
    for got, right in zip(found, wanted):
        near(got, right, tolerance=1e-4)
