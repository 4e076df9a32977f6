"""flash-linear-attention's convolution and scans of delta rules on a GPU against the reference.

A scan is held to the definition in float32, on the same (rounded) inputs, by the relative size of the difference; its
kernels multiply in TF32 for float32. `-s` prints how far off each result was.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kind_values import module
from on_gpu import NEEDS_GPU, error, replayed

pytest.importorskip("fla", reason="needs flash-linear-attention")
pytestmark = NEEDS_GPU

from mambadsl.kinds.conv import causal_conv  # noqa: E402
from mambadsl.kinds.gated_delta_net.module import gated_delta_rule  # noqa: E402
from mambadsl.kinds.kimi_delta.module import kimi_delta_rule  # noqa: E402
from mambadsl.kinds.rows import Rows  # noqa: E402
from mambadsl.kinds.tokens import Tokens  # noqa: E402
from mambadsl.parts.fla.conv import make_conv  # noqa: E402
from mambadsl.parts.fla.delta_rule import SHORT, make_gated_delta_rule, make_kimi_delta_rule  # noqa: E402

T, C = 300, 96


def case(*, dtype=torch.bfloat16, bias: bool = True, taps: int = 4, seed: int = 0):
    g = torch.Generator("cuda").manual_seed(seed)
    # Channels are a slice of the projection's, as in the layer.
    wide = torch.randn(2, T, C + 40, generator=g, device="cuda").to(dtype)
    weights = [torch.randn(C, taps, generator=g, device="cuda"), torch.randn(C, generator=g, device="cuda")]
    weights = [w.to(dtype).requires_grad_() for w in weights]
    return [wide[..., 8 : C + 8].requires_grad_(), weights[0], weights[1] if bias else None]


def results(function, x, weight, bias):
    y, last = function(x, weight, bias)
    assert last is None
    weigh = torch.linspace(-1, 1, C, device="cuda")
    return [y, *torch.autograd.grad((y.float() * weigh).sum(), [t for t in (x, weight, bias) if t is not None])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_conv(dtype, bias, taps, compiled):
    given = case(dtype=dtype, bias=bias, taps=taps)
    part = torch.compile(make_conv(), fullgraph=True) if compiled else make_conv()
    for ours, reference in zip(results(part, *given), results(causal_conv, *given), strict=True):
        assert ours.dtype == reference.dtype
        assert error(ours, reference) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_documents_and_states_are_the_reference_s():
    x, weight, bias = case()
    segments = (torch.arange(T, device="cuda") // 77).int().expand(2, T)
    state = torch.randn(2, C, 3, device="cuda")
    for how in dict(segments_BT=segments), dict(state_BCJ=state):
        for ours, reference in zip(make_conv()(x, weight, bias, **how), causal_conv(x, weight, bias, **how)):
            assert ours is reference or torch.equal(ours, reference)


def test_in_a_cuda_graph():
    given, other = case(), [t.detach() for t in case(seed=1)]

    def run(*tensors):
        return results(make_conv(), *tensors)

    expected = [t.clone() for t in run(*(t.clone().requires_grad_() for t in other))]
    for ours, eager in zip(replayed(run, given, other), expected, strict=True):
        assert error(ours, eager) < 1e-3


#: The definition, the part, whether decays are a channel's.
RULES = {
    "gated": (gated_delta_rule, make_gated_delta_rule, False), "kimi": (kimi_delta_rule, make_kimi_delta_rule, True),
}
#: heads, key_heads (gated only), key_dim, value_dim
SIZES = [(4, 2, 128, 128), (4, 4, 64, 64), (6, 2, 96, 192), (2, 1, 16, 32), (2, 2, 256, 64)]
#: Each is a dozen kernels to compile.
CASES = [*((size, torch.bfloat16) for size in SIZES), (SIZES[0], torch.float32), (SIZES[0], torch.float16)]
LIMIT = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
RULE = pytest.mark.parametrize("rule", RULES)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
STATE = pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])


def documents(length: int = T) -> Rows:
    """Documents that end inside chunks, at their ends, and after one token; padding."""
    rows = [[0] * 100 + [1] * 28 + [2] + [3] * 171, [0] * 3 + [1] * 253 + [2] * 30 + [-1] * 14]
    return Rows.of(Tokens.packed(torch.tensor(rows, dtype=torch.int32, device="cuda")[:, :length]))


def scan_case(rule: str, size, *, dtype=torch.bfloat16, rows: Rows | None = None, length: int = T, seed: int = 0):
    """A wide projection, log decays from none to almost all, betas as large as they get, a state."""
    (H, K, E, P), g = size, torch.Generator("cuda").manual_seed(seed)
    K, channels = (H, (E,)) if rule == "kimi" else (K, ())

    def noise(*shape):
        return torch.randn(shape, generator=g, device="cuda")

    # Not so weak that the definition's sums round it away, and its gradient with it.
    decay = -F.softplus(4 * noise(2, length, H, *channels)) - 1e-3
    beta = (2 if rule == "gated" else 1) * noise(2, length, H).sigmoid()
    if rows is not None:
        decay, beta = rows.without_padding(decay.flatten(2)).view(decay.shape), rows.without_padding(beta)
    wide = noise(2, length, 2 * K * E + H * P + 8).to(dtype)
    return [t.requires_grad_() for t in (wide, decay, beta, noise(2, H, E, P))], K


def scan_results(function, size, K: int, given, *, rows: Rows | None = None, state: bool, grads: bool = True):
    """y and the last state, and the gradients of a fixed random combination of them."""
    H, _, E, P = size
    wide, decay, beta, first = given
    q, k, v = (t.unflatten(-1, (n, -1)) for t, n in zip(wide.split([K * E, K * E, H * P, 8], -1), (K, K, H)))
    outs = function(
        q, k, v, decay, beta, chunk=64, eps=1e-6, segments_BT=None if rows is None else rows.segments_BT,
        state_BHEP=first if state else None,
    )
    if not grads:
        return list(outs)
    weigh = torch.Generator("cuda").manual_seed(7)
    total = sum((o.float() * torch.randn(o.shape, generator=weigh, device="cuda")).sum() for o in outs)
    return [*outs, *torch.autograd.grad(total, given[: 3 + state])]


def widened(given):
    return [t.detach().float().requires_grad_() for t in given]


def held(what: str, found, truth, limit: float):
    errors = [error(a, b) for a, b in zip(found, truth, strict=True)]
    print(what, *(f"{e:.1e}" for e in errors))
    assert all(t.isfinite().all() for t in found) and max(errors) < limit, errors


@RULE
@PACKED
@STATE
@pytest.mark.parametrize("size, dtype", CASES, ids=str)
def test_scan(rule, size, dtype, packed, state):
    definition, make, _ = RULES[rule]
    rows = documents() if packed else None
    given, K = scan_case(rule, size, dtype=dtype, rows=rows)
    found = scan_results(make(), size, K, given, rows=rows, state=state)
    assert [t.dtype for t in found] == [dtype, torch.float32, dtype] + [torch.float32] * (2 + state)
    truth = scan_results(definition, size, K, widened(given), rows=rows, state=state)
    held(f"{rule} {size} {dtype} packed {packed} state {state}:", found, truth, LIMIT[dtype])


@RULE
@PACKED
@STATE
@pytest.mark.parametrize("length", [1, 9, SHORT])
def test_steps(rule, length, packed, state):
    definition, make, _ = RULES[rule]
    rows = documents(length) if packed else None
    for size, dtype in CASES:
        given, K = scan_case(rule, size, dtype=dtype, rows=rows, length=length)
        with torch.no_grad():
            found = scan_results(make(), size, K, given, rows=rows, state=state, grads=False)
            truth = scan_results(definition, size, K, widened(given), rows=rows, state=state, grads=False)
        held(f"{rule} {size} {dtype} {length}:", found, truth, 1e-2 if dtype == torch.bfloat16 else 2e-3)


@RULE
@pytest.mark.parametrize("decay", [-1e38, -200.0, -1e-30, 0.0])
def test_extreme_decays_are_finite(rule, decay):
    size, rows = SIZES[0], documents()
    given, K = scan_case(rule, size, dtype=torch.float32, rows=rows)
    given[1] = torch.full_like(given[1], decay).requires_grad_()
    definition, make, _ = RULES[rule]
    found = scan_results(make(), size, K, given, rows=rows, state=True)
    truth = scan_results(definition, size, K, given, rows=rows, state=True)
    # Where nothing is left of a decay, its gradient is 0, or rounding.
    held(f"{rule} {decay}:", found[:3] + found[4:], truth[:3] + truth[4:], 1e-2)
    assert found[3].isfinite().all()


@RULE
def test_a_document_sees_nothing_of_another(rule):
    """Not a bit, where the other document's numbers are a million times as large."""
    size, make = SIZES[0], RULES[rule][1]
    given, K = scan_case(rule, size)
    segments = (torch.arange(T, device="cuda") >= 131).int().expand(2, T)
    rows = Rows(segments_BT=segments)
    other = [t.detach().clone() for t in given]
    other[0][:, :131] *= 1e6
    with torch.no_grad():
        found = [scan_results(make(), size, K, now, rows=rows, state=True, grads=False) for now in (given, other)]
    (y, last), (y_other, last_other) = found
    assert not torch.equal(y[:, :131], y_other[:, :131])
    assert torch.equal(y[:, 131:], y_other[:, 131:]) and torch.equal(last, last_other)


@RULE
def test_scan_in_a_cuda_graph(rule):
    """Packed rows, forward and backward: nothing waits for the device."""
    size, rows = SIZES[0], documents()
    (given, K), (other, _) = (scan_case(rule, size, rows=rows, seed=seed) for seed in (0, 1))
    make = RULES[rule][1]

    def run(*tensors):
        y, last = scan_results(make(), size, K, tensors, rows=rows, state=True, grads=False)
        weigh = [torch.linspace(-1, 1, t.numel(), device="cuda").view_as(t) for t in (y, last)]
        total = sum((t.float() * w).sum() for t, w in zip((y, last), weigh))
        return [y, last, *torch.autograd.grad(total, tensors)]

    expected = [t.clone() for t in run(*(t.detach().clone().requires_grad_() for t in other))]
    for ours, eager in zip(replayed(run, given, [t.detach() for t in other]), expected, strict=True):
        assert error(ours, eager) < 1e-3


@RULE
@PACKED
def test_a_layer_compiles_whole(rule, packed):
    """Training, a prompt and a step of a layer, by inductor."""
    kind = {"gated": "gated_delta_net", "kimi": "kimi_delta"}[rule]
    fields = dict(heads=4, key_dim=64, value_dim=64)
    plain, ours = (module(kind, d_model=128, **fields).cuda() for _ in range(2))
    ours.parts["scan"] = RULES[rule][1]()
    rows = torch.tensor([[0] * 100 + [1] * 185 + [-1] * 15, [0] * 300], dtype=torch.int32, device="cuda")
    tokens = Tokens.packed(rows) if packed else Tokens.plain(2, T, device="cuda")
    x = torch.randn(2, T, 128, device="cuda")
    whole = torch.compile(ours, fullgraph=True, dynamic=False)

    def found(function, layer):
        y = function(x, tokens)
        if packed:
            y = y * (rows >= 0)[..., None]
        return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]

    held(f"{kind} packed {packed}:", found(whole, ours), found(plain, plain), 2e-2)
    with torch.no_grad():
        results = []
        for function, layer in (whole, ours), (plain, plain):
            state = layer.init_state(2, dtype=torch.float32, device="cuda")
            pieces = ((0, 100), (100, 101), (101, 102))
            ys = [function(x[:, a:b], Tokens.plain(2, b - a, device="cuda"), state) for a, b in pieces]
            results.append([*ys, state["delta"]])
    held(f"{kind} steps:", *results, 1e-2)
