"""flash-linear-attention's walks of HGRN and RWKV-4 in the slots of `rg_lru` and `wkv4`: documents, states, gradients
and opaque ops, on the CPU. The kernels are played by loops; fla's own run in Triton's interpreter, where it is
installed."""

from __future__ import annotations

from types import ModuleType

import interpreter
import pytest
import torch
import torch.nn.functional as F
from kind_values import module, trained
from stand_ins import gradients, installed

from mambadsl.kinds.rg_lru import module as rg_lru
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.wkv4 import module as wkv4
from mambadsl.parts.fla import decaying_sums, weighted_means
from mambadsl.run.doctor.untuned import untuned

SCANS = pytest.mark.parametrize("scan", ["rg_lru", "wkv4"])
STATE = pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
#: Tokens of rows: of one run, of whole runs, of what is left over.
LENGTHS = pytest.mark.parametrize("length", [1, 8, 9, 16, 30])
B, I = 2, 20
PARTS = {"rg_lru": decaying_sums.make_decaying_sums, "wkv4": weighted_means.make_weighted_means}
DEFINITIONS = {"rg_lru": rg_lru.decaying_sums, "wkv4": wkv4.weighted_means}


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    monkeypatch.setattr(decaying_sums, "RUN", 8)


def noise(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(scan: str, function, length: int, *, packed: bool, state: bool, use=None):
    """All results, and the gradients of a random combination of those that are used (and have one)."""
    segments = (torch.arange(length) // 5).int().expand(B, length) if packed else None
    if scan == "rg_lru":
        leaves = [noise(B, length, I), -F.softplus(3 * noise(B, length, I, seed=1)), noise(B, I, seed=2)]
        leaves = [t.requires_grad_() for t in leaves]
        outs = function(*leaves[:2], chunk=64, segments_BT=segments, state_BI=leaves[2] if state else None)
        used, given = list(outs), leaves[: 2 + state]
    else:
        some = torch.arange(I) % 3 > 0
        past = [torch.where(some, t, 0) for t in (noise(B, I), noise(B, I).abs() + 0.1, noise(B, I, seed=1))]
        leaves = [2 * noise(B, length, I, seed=2), noise(B, length, I, seed=3), noise(I).exp(), noise(I, seed=4), *past]
        leaves = [t.requires_grad_() for t in leaves]
        y, sums = function(
            *leaves[:4], torch.ones(B, length, 1), chunk=64, segments_BT=segments,
            past=tuple(leaves[4:]) if state else None,
        )
        outs, used, given = (y, *sums), [y, *sums[:2]], leaves[: 7 if state else 4]
    used = [out for n, out in enumerate(used) if use is None or n in use]
    total = sum((out * noise(*out.shape, seed=9)).sum() for out in used)
    return [*outs, *torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)]


def near(mine, theirs, tolerance: float = 1e-5):
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.isfinite().all() and (a - b).norm() <= tolerance * (b.norm() + 1e-6)


def equals_the_definition(scan: str, length: int, **how):
    near(results(scan, PARTS[scan](), length, **how), results(scan, DEFINITIONS[scan], length, **how))


@interpreter.only
@SCANS
@LENGTHS
@PACKED
@STATE
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:.*roll back to CPU")
def test_fla_s_kernels(scan, length, packed, state):
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    with untuned():
        equals_the_definition(scan, length, packed=packed, state=state)


def walk(u, decay, state=None):
    h = torch.zeros_like(u[:, 0]) if state is None else state
    all_h = []
    for t in range(u.shape[1]):
        h = decay[:, t].exp() * h + u[:, t]
        all_h.append(h)
    return torch.stack(all_h, 1)


def pieces(bounds, *tensors):
    """The rows of a flat row."""
    sizes = (bounds[1:] - bounds[:-1]).tolist()
    return zip(*(t.split(sizes, 1) for t in tensors))


def hgrn_fwd(u, decay, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert u.is_contiguous() and decay.is_contiguous()
    if cu_seqlens is None:
        h = walk(u, decay, initial_state)
        return h, h[:, -1].clone() if output_final_state else None
    starts = [None] * len(cu_seqlens) if initial_state is None else initial_state.split(1)
    rows = [walk(*piece, start) for piece, start in zip(pieces(cu_seqlens, u, decay), starts)]
    return torch.cat(rows, 1), torch.cat([h[:, -1] for h in rows]) if output_final_state else None


def hgrn_bwd(g, o, do, dht=None, initial_state=None, cu_seqlens=None):
    if cu_seqlens is not None:
        dhts = [None] * len(initial_state) if dht is None else dht.split(1)
        rows = [hgrn_bwd(*piece, dh, h) for piece, dh, h in
                zip(pieces(cu_seqlens, g, o, do), dhts, initial_state.split(1))]
        return tuple(torch.cat(t, n) for t, n in zip(zip(*rows), (1, 1, 0)))
    before = torch.zeros_like(o[:, 0]) if initial_state is None else initial_state
    u = o - g.exp() * torch.cat([before[:, None], o[:, :-1]], 1)
    do = do if dht is None else torch.cat([do[:, :-1], do[:, -1:] + dht[:, None]], 1)
    return tuple(gradients(walk, u, g, initial_state, dout=do))


def rwkv4(w, u, k, v, past):
    (a, b, scale), found, sums = past[:, :, 0].unbind(1), [], [past[:, :, 0]]
    for t in range(k.shape[1]):
        top = torch.maximum(scale, k[:, t] + u)
        old, new = (scale - top).exp(), (k[:, t] + u - top).exp()
        found.append((old * a + new * v[:, t]) / (old * b + new))
        top = torch.maximum(scale + w, k[:, t])
        old, new = (scale + w - top).exp(), (k[:, t] - top).exp()
        a, b, scale = old * a + new * v[:, t], old * b + new, top
        sums.append(torch.stack([a, b, scale], 1))
    return torch.stack(found, 1), torch.stack(sums, 2)


def rwkv4_backward(w, u, k, v, sums, dy, dlast):
    def both(*given):
        y, sums = rwkv4(*given)
        return torch.cat([y.flatten(), sums[:, :, -1:].flatten()])

    assert sums.shape[2] == k.shape[1] + 1 and dlast.shape == (B, 3, 1, k.shape[2])
    dboth = torch.cat([dy.flatten(), dlast.flatten()])
    dw, *rest = gradients(both, w, u, k, v, sums[:, :, :1], dout=dboth)
    return dw * w, *rest


@pytest.fixture
def played(monkeypatch):
    """fla's functions, by loops."""
    hgrn, wkv = (ModuleType(f"fla.ops.{name}.fused_recurrent") for name in ("hgrn", "rwkv4"))
    hgrn.fused_recurrent_hgrn_fwd, hgrn.fused_recurrent_hgrn_bwd = hgrn_fwd, hgrn_bwd
    wkv.fused_recurrent_rwkv4_forward, wkv.fused_recurrent_rwkv4_backward = rwkv4, rwkv4_backward
    installed(monkeypatch, *map(ModuleType, ("fla", "fla.ops", "fla.ops.hgrn", "fla.ops.rwkv4")), hgrn, wkv)


@SCANS
@LENGTHS
@PACKED
@STATE
def test_equals_the_definition(played, scan, length, packed, state):
    equals_the_definition(scan, length, packed=packed, state=state)


@SCANS
@pytest.mark.parametrize("use", [{0}, {1}, {0, 1}], ids=str)
def test_some_results_are_used(played, scan, use):
    equals_the_definition(scan, 11, packed=False, state=True, use=use)


@PACKED
def test_a_document_sees_nothing_of_another(played, packed):
    """Not a bit."""
    u, decay, state = noise(B, 20, I), -noise(B, 20, I, seed=1).abs(), noise(B, I)
    segments = (torch.arange(20) >= 11).int().expand(B, 20)
    found = [
        decaying_sums.decaying_sums(scale * u, decay, chunk=64, segments_BT=segments, state_BI=state)
        for scale in (torch.where(segments == 0, size, 1.0)[..., None] for size in (1.0, 1e6))
    ]
    assert torch.equal(found[0][0][:, 11:], found[1][0][:, 11:]) and torch.equal(found[0][1], found[1][1])


def test_ops_say_what_they_give(played):
    how = dict(test_utils=("test_schema", "test_faketensor"))

    def detached(*given):
        return tuple(t if t is None else t.detach() for t in given)

    for length in 5, 20:
        for state in noise(B, I), None:
            args = tuple(
                t if t is None else t.clone().requires_grad_()
                for t in (noise(B, length, I), -noise(B, length, I).abs(), state)
            )
            torch.library.opcheck(decaying_sums._op._opoverload, args)
            back = detached(args[0], decaying_sums._op(*args), *args[1:])
            torch.library.opcheck(decaying_sums._backward_op._opoverload, back, **how)
    k, v = noise(B, 5, I).bfloat16(), noise(B, 5, I, seed=1)
    args = tuple(t.clone().requires_grad_() for t in (k, v, *noise(2, I).exp(), *noise(3, B, I).exp()))
    torch.library.opcheck(weighted_means._op._opoverload, args)
    y, sums, values, weight, _ = weighted_means._op(*args)
    back = detached(y, values, weight, sums, *args[:4])
    torch.library.opcheck(weighted_means._backward_op._opoverload, back, **how)


@SCANS
@PACKED
def test_a_layer_compiles_whole(played, scan, packed):
    fields = dict(blocks=2, chunk=4) if scan == "rg_lru" else dict(chunk=4)
    plain, ours = (module(scan, d_model=12, d_inner=16, **fields) for _ in range(2))
    ours.parts["scan"] = PARTS[scan]()
    segments = torch.tensor([[-1] * 2 + [0] * 9 + [1] * 7, [0] * 12 + [-1] + [2] * 5], dtype=torch.int32)
    tokens, real = (Tokens.packed(segments), segments >= 0) if packed else (Tokens.plain(B, 18), segments > -2)
    x = noise(B, 18, 12)

    whole = torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")
    near(trained(whole, ours, x, tokens, real), trained(plain, plain, x, tokens, real), 1e-4)
    with torch.no_grad():
        ends = []
        for layer in ours, plain:
            state = layer.init_state(B, dtype=torch.float32)
            cuts = ((0, 10), (10, 11), (11, 12))
            ys = [layer(x[:, a:b], Tokens.plain(B, b - a, start=a), state) for a, b in cuts]
            ends.append([*ys, *(t for t in state.values() if t.is_floating_point())])
        near(*ends)


def test_a_rate_of_nothing(played):
    """exp(time_decay) of 0, and sums of no token yet: finite, as the definition."""
    args = [noise(B, 4, I), noise(B, 4, I, seed=1), torch.zeros(I), noise(I), torch.ones(B, 4, 1)]
    leaf = args[2].requires_grad_()
    found = []
    for function in weighted_means.weighted_means, wkv4.weighted_means:
        y, _ = function(*args, chunk=4, past=(torch.zeros(B, I),) * 3)
        found.append(y)
        assert torch.autograd.grad(y.sum(), leaf)[0].isfinite().all()
    near(found[:1], found[1:])
