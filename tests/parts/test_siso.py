"""mamba_ssm's kernels of Mamba-3 in the slot `mamba3.core`: documents, states, gradients, opaque ops, on the CPU. The
kernels are played by the definition; the package's own run in Triton's interpreter, where it is installed."""

from __future__ import annotations

import interpreter
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kind_values import module, values
from stand_ins import gradients

from mambadsl.kinds.kind import Dims
from mambadsl.kinds.mamba3.module import trapezoidal_scan, turned
from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.machine import Machine
from mambadsl.parts.mamba_ssm import load, package, siso, siso_kernels
from mambadsl.parts.mamba_ssm.siso_kernels import Inputs, Kept
from mambadsl.parts.part import Request
from mambadsl.run.doctor.untuned import untuned

T, D = 37, 24
FORMS = {
    "gate": dict(heads=4, head_dim=16, d_state=16, groups=2),
    "norm, all turn": dict(heads=2, head_dim=16, d_state=32, rope_fraction=1, gated_norm="before_gate"),
}
EACH = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
STATE = pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
#: A document of one token, padding behind, one that goes on from the state and one that does not.
SEGMENTS = torch.tensor([[0] * 5 + [1] + [2] * 20 + [-1] * 11, [3] * 16 + [4] * 21], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(siso_kernels, "CHUNKS", {4: 16})


def noise(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(fields):
    """The definition, and the part around it."""
    plain, ours = (module("mamba3", d_model=D, chunk=16, **fields) for _ in range(2))
    ours.parts["core"] = siso.core
    return plain, ours


def results(layer, *, packed: bool, state: bool) -> dict[str, torch.Tensor]:
    """y and the state after it; gradients of a random combination of all by x, the state and the weights."""
    tokens, real = (Tokens.packed(SEGMENTS), SEGMENTS >= 0) if packed else (Tokens.plain(2, T), SEGMENTS > -2)
    leaves = {"dx": 2 * noise(2, T, D)}
    if state:
        before = layer.init_state(2, dtype=torch.float32)
        leaves |= {f"d {name}": noise(*t.shape, seed=n) for n, (name, t) in enumerate(before.items())}
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    now = {name.removeprefix("d "): t for name, t in leaves.items() if name != "dx"} if state else None
    y = layer(leaves["dx"], tokens, now)
    outs = {"y": y[real], **({name: t for name, t in now.items() if t.is_floating_point()} if state else {})}
    total = sum((out * noise(*out.shape, seed=9)).sum() for out in outs.values())
    leaves |= dict(layer.named_parameters())
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return outs | dict(zip(leaves, grads))


def near(mine, theirs, tolerance: float = 3e-5):
    assert mine.keys() == theirs.keys()
    for name, b in theirs.items():
        a = mine[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-6), (name, ((a - b).norm() / b.norm()).item())


def equals_the_definition(fields, **how):
    theirs, mine = (results(layer, **how) for layer in layers(fields))
    near(mine, theirs)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def sin(x):
    return tl.sin(x)


@interpreter.only
@EACH
@PACKED
@STATE
def test_mamba_ssm_s_kernels(monkeypatch, fields, packed, state):
    try:
        kernels = load.siso_kernels()
    except ImportError as reason:
        pytest.skip(f"needs mamba_ssm: {reason}")
    # What is written for the GPU itself; and a tensor must say that it is there.
    for kernel in kernels.forward, kernels.backward:
        monkeypatch.setattr(kernel, "cos_approx", cos)
        monkeypatch.setattr(kernel, "sin_approx", sin)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with untuned():
        equals_the_definition(fields, packed=packed, state=state)


def scan(q, k, x, z, log_decay, dt, trap, q_bias, k_bias, angle, D, state):
    """What the kernel computes: out and the last state."""
    q, k = (
        turned((t.repeat_interleave(x.shape[2] // t.shape[2], 2) + bias)[:, :, :, None], angle.cos(), angle.sin())
        for t, bias in ((q, q_bias), (k, k_bias))
    )
    log_decay, dt, share = log_decay.mT, dt.mT, torch.sigmoid(trap.mT)
    later = F.pad((dt * (1 - share))[:, 1:], (0, 0, 0, 1))
    y, last = trapezoidal_scan(x[:, :, :, None], k, q, log_decay, share * dt, later, chunk=16, state_BHPN=state)
    y = y[:, :, :, 0] + D[:, None] * x
    return (y if z is None else y * F.silu(z)), last


@pytest.fixture
def played(monkeypatch):
    def check(*tensors):
        assert all(t is None or t.is_contiguous() for t in tensors)

    def forward(i, state, *, keep, last):
        check(*i, state)
        out, after = scan(*i, state)
        return out.contiguous(), after.contiguous() if last else None, Kept.of(i, keep=keep)

    def backward(i, kept, dout, dlast, *, has_state):
        check(*i, dout, dlast)
        assert kept.q.shape == (*i.x.shape[:3], i.q.shape[-1]) and (kept.y.numel() > 0) == (i.z is not None)
        (B, _, H, P), N = i.x.shape, i.q.shape[-1]
        dlast = dout.new_zeros(B, H, P, N) if dlast is None else dlast
        # The kernel needs no state for it; the definition does.
        state = now["state"] if has_state else None
        found = gradients(
            lambda *given: torch.cat([t.flatten() for t in scan(*given)]), *i, state,
            dout=torch.cat([dout.flatten(), dlast.flatten()]),
        )
        found = [None if t is None else t.contiguous() for t in found]
        return Inputs(*found[:11]), found[11]

    now = {}

    def remembering(i, state, **how):
        now["state"] = state
        return forward(i, state, **how)

    monkeypatch.setattr(siso, "forward", remembering)
    monkeypatch.setattr(siso, "backward", backward)


@EACH
@PACKED
@STATE
def test_equals_the_definition(played, fields, packed, state):
    equals_the_definition(fields, packed=packed, state=state)


@EACH
def test_tokens_after_a_prompt(played, fields):
    """Chunks go through the kernel, single tokens do not."""
    found = []
    for layer in layers(fields):
        state, ys = layer.init_state(2, dtype=torch.float32), []
        with torch.no_grad():
            for a, b in (0, 20), (20, 21), (21, 22), (22, T):
                ys.append(layer(noise(2, T, D)[:, a:b], Tokens.plain(2, b - a, start=a), state))
        found.append({"y": torch.cat(ys, 1), **state})
    near(*(dict((n, t) for n, t in one.items() if t.is_floating_point()) for one in found))


def test_ops_say_what_they_give(played):
    B, H, P, N, G, A = 2, 2, 16, 16, 1, 4
    wide = [noise(B, H, 5) for _ in range(3)]
    given = [noise(B, 5, G, N), noise(B, 5, G, N), noise(B, 5, H, P), noise(B, 5, H, P), *wide, noise(H, N),
             noise(H, N), noise(B, 5, H, A), noise(H), noise(B, H, P, N)]
    how = dict(test_utils=("test_schema", "test_faketensor"))
    for none in (), (3,), (11,), (3, 11):
        for last in False, True:
            args = tuple(None if n in none else t.clone().requires_grad_() for n, t in enumerate(given))
            torch.library.opcheck(siso._op._opoverload, (*args, True, last), test_utils=(
                "test_schema", "test_autograd_registration", "test_faketensor"))
            out, after, *kept = siso._op(*args, True, last)
            back = (out, after if last else None, *kept, *args[:11])
            back = tuple(None if t is None else t.detach() for t in back)
            torch.library.opcheck(siso._backward_op._opoverload, (*back, args[11] is not None), **how)
            with torch.no_grad():
                torch.library.opcheck(siso._op._opoverload, (*args, False, last), **how)


@EACH
@PACKED
def test_a_layer_compiles_whole(played, fields, packed):
    plain, ours = layers(fields)
    whole = torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")
    tokens, real = (Tokens.packed(SEGMENTS), SEGMENTS >= 0) if packed else (Tokens.plain(2, T), SEGMENTS > -2)

    def found(function, layer):
        y = function(noise(2, T, D), tokens)[real]
        names = dict(layer.named_parameters())
        return {"y": y, **dict(zip(names, torch.autograd.grad(y.square().sum(), list(names.values()))))}

    near(found(whole, ours), found(plain, plain), 1e-4)


@pytest.mark.parametrize("fields, reasons", [
    (dict(), []),
    (dict(rope_fraction=1, groups=2, gated_norm="before_gate"), []),
    (dict(rank=4), ["takes one input a head, not rank=4 (mamba-ssm's kernels for several need tilelang)"]),
    (dict(head_dim=48), ["takes head_dim 16, 32, 64 or 128, not 48"]),
    (dict(head_dim=8, d_state=256), [
        "takes head_dim 16, 32, 64 or 128, not 8", "takes d_state 16, 32, 64 or 128, not 256",
    ]),
    (dict(rope_fraction=0.3), ["turns 2, 4, 6, ... pairs of channels, not 19 (d_state * rope_fraction / 2)"]),
    (dict(d_state=16, rope_fraction=0.1), [
        "turns 2, 4, 6, ... pairs of channels, not 0 (d_state * rope_fraction / 2)",
    ]),
])
def test_what_the_part_takes(fields, reasons):
    f = values("mamba3", d_model=256, **fields)
    request = Request("mamba3.core", f, Dims(256, 256), None, None, True, "bf16", Machine("cuda"))
    assert list(package.siso(request)) == reasons
