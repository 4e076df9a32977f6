"""flash-linear-attention's scans in their slots: documents, states, gradients and opaque ops, on the CPU. The rules are
played by the kinds' definitions; fla's own kernels run in Triton's interpreter, where fla is installed."""

from __future__ import annotations

import builtins
from types import ModuleType, SimpleNamespace

import interpreter
import pytest
import torch
import torch.nn.functional as F
from kind_values import module, trained, values
from stand_ins import gradients, installed

from mambadsl.kinds.chunks import LOWEST_LOG_DECAY
from mambadsl.kinds.gated_delta_net.module import gated_delta_rule
from mambadsl.kinds.kimi_delta.module import kimi_delta_rule
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.fla import accepts, delta_rule, gated
from mambadsl.parts.machine import Machine
from mambadsl.parts.part import Request
from mambadsl.run.doctor.untuned import untuned

DEFINITIONS = {"gated": gated_delta_rule, "kimi": kimi_delta_rule}
RULES = pytest.mark.parametrize("rule", DEFINITIONS)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
STATE = pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
B, T, H, E, P = 2, 70, 2, 16, 24
SEGMENTS = torch.tensor([[4] * 20 + [5] + [6] * 10 + [4] * 39, [0] * 64 + [3] * 6], dtype=torch.int32)


def noise(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(rule: str):
    """What a layer projects, log decays (one beyond the smallest), betas, a state."""
    K = key_heads(rule)
    decay = -F.softplus(3 * noise(B, T, H, *(() if rule == "gated" else (E,)), seed=1))
    decay[0, 7] = -1e30
    return [noise(B, T, 2 * K * E + H * P + 5), decay, noise(B, T, H, seed=2).sigmoid(), noise(B, H, E, P, seed=3)]


def key_heads(rule: str) -> int:
    return H // 2 if rule == "gated" else H


def scan(function, rule: str, wide, decay, beta, first, *, packed: bool, state: bool, length: int = T):
    K = key_heads(rule)
    q, k, v, _ = wide[:, :length].split([K * E, K * E, H * P, 5], -1)
    return function(
        *(t.unflatten(-1, (heads, -1)) for t, heads in ((q, K), (k, K), (v, H))), decay[:, :length], beta[:, :length],
        chunk=64, eps=1e-6, segments_BT=SEGMENTS[:, :length] if packed else None, state_BHEP=first if state else None,
    )


def results(function, rule, *, packed, state, use=(True, True)):
    """y, the last state, and the gradients of a random combination of those that are used."""
    leaves = [t.clone().requires_grad_() for t in case(rule)]
    outs = scan(function, rule, *leaves, packed=packed, state=state)
    sum((out * noise(*out.shape, seed=9)).sum() for out, used in zip(outs, use) if used).backward()
    return [*outs, *(t.grad for t in leaves[: 3 + state])]


def near(mine, theirs, tolerance):
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-6)


def equals_the_definition(rule, tolerance, **how):
    part = getattr(delta_rule, f"make_{rule}_delta_rule")()
    near(results(part, rule, **how), results(DEFINITIONS[rule], rule, **how), tolerance)


def steps_equal_the_definition(rule, tolerance, **how):
    part = getattr(delta_rule, f"make_{rule}_delta_rule")()
    with torch.no_grad():
        for length in 1, 25:
            found, truth = (
                scan(f, rule, *case(rule), length=length, **how) for f in (part, DEFINITIONS[rule])
            )
            near(found, truth, tolerance)


@pytest.fixture
def fla(monkeypatch):
    chunk_delta_h = pytest.importorskip("fla.ops.common.chunk_delta_h")

    class Count(int):
        def to(self, dtype):
            return self

    # Its loops count in tensors, the interpreter's in Python's numbers.
    monkeypatch.setattr(chunk_delta_h, "range", lambda *n: map(Count, builtins.range(*n)), raising=False)
    with untuned():
        yield


@interpreter.only
@RULES
@PACKED
@STATE
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:.*roll back to CPU")
def test_fla_s_kernels(fla, rule, packed, state):
    equals_the_definition(rule, 5e-5, packed=packed, state=state)
    steps_equal_the_definition(rule, 1e-5, packed=packed, state=state)


def stand_in(definition):
    """A rule as `gated.py` and `kimi.py` are: no documents, no norm but in steps, contiguous tensors only."""

    def compute(q, k, v, log_decay, beta, state):
        # q and k have length 1 up to its eps: divided by it once more.
        y, last = definition(q, k, v, log_decay, beta, chunk=64, eps=0.0, state_BHEP=state)
        return y.contiguous(), last

    def check(*tensors):
        assert all(t is None or t.is_contiguous() for t in tensors)
        assert tensors[3].isfinite().all() and all(t is None or t.dtype == torch.float32 for t in tensors)

    def forward(q, k, v, log_decay, beta, state, scale):
        check(q, k, v, log_decay, beta, state)
        assert scale == k.shape[-1] ** -0.5
        kept = v.new_zeros(*v.shape[:3], 64)
        y, last = compute(q, k, v, log_decay, beta, state)
        return y, last, (log_decay, kept, kept.clone() if definition is kimi_delta_rule else kept.new_empty(0))

    def backward(dy, dlast, saved, q, k, v, beta, state, scale):
        check(dy, dlast, q, saved[0], k, v, beta, state)
        dlast = dy.new_zeros(B, v.shape[2], k.shape[3], v.shape[3]) if dlast is None else dlast

        def both(*given):
            return torch.cat([t.flatten() for t in compute(*given)])

        dboth = torch.cat([dy.flatten(), dlast.flatten()])
        return tuple(gradients(both, q, k, v, saved[0], beta, state, dout=dboth))

    def steps(q, k, v, log_decay, beta, state, scale):
        check(q, k, v, log_decay, beta, state)
        y, last = definition(q, k, v, log_decay, beta, chunk=1, eps=1e-6, state_BHEP=state)
        return y.contiguous(), last

    return SimpleNamespace(forward=forward, backward=backward, steps=steps, CHUNK=64)


@pytest.fixture
def played(monkeypatch):
    for name, definition in DEFINITIONS.items():
        monkeypatch.setitem(delta_rule.RULES, name, stand_in(definition))
    norm = ModuleType("fla.modules.norm.l2norm")

    def l2norm_fwd(x, eps=1e-6):
        assert x.is_contiguous()
        rstd = (x.square().sum(-1) + eps).rsqrt()
        return x * rstd[..., None], rstd

    def l2norm_bwd(y, rstd, dy):
        return (dy - (dy * y).sum(-1, keepdim=True) * y) * rstd[..., None]

    norm.l2norm_fwd, norm.l2norm_bwd = l2norm_fwd, l2norm_bwd
    names = ("fla", "fla.modules", "fla.modules.norm", "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.kda")
    installed(monkeypatch, *map(ModuleType, names), norm)


@RULES
@PACKED
@STATE
def test_equals_the_definition(played, rule, packed, state):
    equals_the_definition(rule, 5e-5, packed=packed, state=state)
    steps_equal_the_definition(rule, 1e-5, packed=packed, state=state)


@RULES
@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["y", "last state"])
def test_one_result_is_used(played, rule, use):
    equals_the_definition(rule, 5e-5, packed=True, state=True, use=use)


@RULES
def test_ops_say_what_they_give(played, rule):
    wide, decay, beta, state = case(rule)
    K = key_heads(rule)
    q, k, v, _ = wide.split([K * E, K * E, H * P, 5], -1)
    given = [t.unflatten(-1, (heads, -1)) for t, heads in ((q, K), (k, K), (v, H))] + [decay, beta, state]
    starts = torch.zeros(B, T, dtype=torch.bool)
    for some in (starts, None):
        args = (*(t.requires_grad_() for t in map(torch.clone, given)), some, rule)
        torch.library.opcheck(delta_rule._op._opoverload, args)
        back = (v.unflatten(-1, (H, -1)), state, *delta_rule._op(*args)[2:], *args[:3], *args[4:])
        back = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in back)
        how = dict(test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(delta_rule._backward_op._opoverload, back, **how)
        plain = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in args)
        torch.library.opcheck(delta_rule._steps_op._opoverload, plain, **how)


LAYERS = {
    "gated": ("gated_delta_net", dict(heads=2, key_heads=1, key_dim=16, value_dim=16)),
    "kimi": ("kimi_delta", dict(heads=2, key_dim=16, value_dim=16, decay_rank=4)),
}


@RULES
@PACKED
def test_a_layer_compiles_whole(played, rule, packed):
    kind, fields = LAYERS[rule]
    plain, ours = (module(kind, **fields) for _ in range(2))
    ours.parts["scan"] = getattr(delta_rule, f"make_{rule}_delta_rule")()
    padded = torch.where(SEGMENTS == 5, -1, SEGMENTS)
    tokens, real = (Tokens.packed(padded), padded >= 0) if packed else (Tokens.plain(B, T), SEGMENTS >= 0)
    x = noise(B, T, 32)

    whole = torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")
    near(trained(whole, ours, x, tokens, real), trained(plain, plain, x, tokens, real), 1e-4)
    with torch.no_grad():
        pieces = []
        for layer, function in ((ours, torch.compile(ours, fullgraph=True, backend="aot_eager")), (plain, plain)):
            state = layer.init_state(B, dtype=torch.float32)
            ys = [function(x[:, a:b], Tokens.plain(B, b - a), state) for a, b in ((0, 3), (3, 4), (4, 5))]
            pieces.append([*ys, state["delta"]])
        near(*pieces, 1e-5)


@pytest.mark.parametrize("length, heads", [(64, 1), (70, 2), (5, 3)])
def test_the_step_that_is_torch_s(length, heads):
    """Against autograd: what reads the state before a chunk, what writes to the state behind it, and pairs."""
    K, chunks = 2, -(-length // 64)
    q, k = noise(B, length, K, E), noise(B, length, K, E, seed=1)
    new, dy, dnew = (noise(B, length, K * heads, P, seed=seed) for seed in (2, 3, 4))
    before, dafter = (noise(B, chunks, K * heads, E, P, seed=seed) for seed in (5, 6))
    taken, step = noise(B, length, K * heads, E, seed=7), -noise(B, length, K * heads, seed=8).abs()
    sums = torch.cat([piece.cumsum(1) for piece in step.split(64, 1)], 1)
    sums[:, -1:] += LOWEST_LOG_DECAY
    leaves = [t.clone().requires_grad_() for t in (q, k, taken, sums)]

    def objective(q, k, taken, sums):
        total = 0
        for c, rows in enumerate(torch.arange(length).split(64)):
            q_, k_ = (t[:, rows].repeat_interleave(heads, 2) for t in (q, k))
            g, state = sums[:, rows], before[:, c]
            decay = (g[:, :, None] - g[:, None]).clamp_max(0).exp2() * torch.ones(2 * [len(rows)]).tril()[..., None]
            scores = torch.einsum("bihe,bjhe,bijh->bijh", q_, k_, decay)
            y = torch.einsum("bihe,bhep,bih->bihp", q_, state, g.exp2())
            y = 0.3 * (y + torch.einsum("bijh,bjhp->bihp", scores, new[:, rows]))
            after = state * g[:, -1].exp2()[..., None, None]
            after = after + torch.einsum("bihe,bihp,bih->bhep", k_, new[:, rows], (g[:, -1:] - g).exp2())
            used = -torch.einsum("bihe,bhep->bihp", taken[:, rows], state)
            total = total + (y * dy[:, rows]).sum() + (after * dafter[:, c]).sum() + (used * dnew[:, rows]).sum()
        return total

    wanted = torch.autograd.grad(objective(*leaves), leaves)
    found = gated.read_and_written(q, k, new, dy, dnew, sums, before, dafter, scale=0.3)
    # Sums are to the base 2; the scan's own kernel takes their gradient as of natural ones.
    near(found[:3], wanted[:3], 1e-5)
    near(found[3:], [wanted[3] / torch.tensor(2.0).log()], 1e-5)


@pytest.mark.parametrize("fields, reasons", [
    (dict(), []),
    (dict(key_dim=8), ["takes key_dim from 16 to 256, not 8"]),
    (dict(key_dim=320), ["takes key_dim from 16 to 256, not 320"]),
    (dict(key_dim=20, value_dim=12), ["takes key_dim in eights, not 20", "takes value_dim in eights, not 12"]),
    (dict(qk_eps=1e-5), ["norms queries and keys with an eps of 1e-06, not 1e-05"]),
])
@pytest.mark.parametrize("kind", ["gated_delta_net", "kimi_delta"])
def test_what_the_part_takes(kind, fields, reasons):
    f = values(kind, d_model=256, **fields)
    request = Request(f"{kind}.scan", f, Dims(256, 256), None, None, True, "bf16", Machine("cuda"))
    assert list(accepts.delta_rule(request)) == reasons
