"""flash-linear-attention's walks of HGRN and RWKV-4 on a GPU against the reference: the scans of `rg_lru` and `wkv4`.

All is computed in float32, token by token: held to the definition in float32, on the same (rounded) inputs. `-s` prints
how far off each result was.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kind_values import module
from on_gpu import NEEDS_GPU, error, replayed

pytest.importorskip("fla", reason="needs flash-linear-attention")
pytestmark = NEEDS_GPU

from mambadsl.kinds.rg_lru import module as rg_lru  # noqa: E402
from mambadsl.kinds.rows import Rows  # noqa: E402
from mambadsl.kinds.tokens import Tokens  # noqa: E402
from mambadsl.kinds.wkv4 import module as wkv4  # noqa: E402
from mambadsl.parts.fla import decaying_sums, weighted_means  # noqa: E402

T = 300
DEFINITIONS = {"rg_lru": rg_lru.decaying_sums, "wkv4": wkv4.weighted_means}
PARTS = {"rg_lru": decaying_sums.make_decaying_sums, "wkv4": weighted_means.make_weighted_means}
RESULTS = {
    "rg_lru": ("h", "last", "du", "dlog_decay", "dstate"),
    "wkv4": ("y", "values", "weight", "log_scale", "dk", "dv", "drate", "dfirst", "dvalues", "dweight", "dlog_scale"),
}
SCANS = pytest.mark.parametrize("scan", DEFINITIONS)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
STATE = pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
#: Of one run, of whole runs, one token more, long.
LENGTHS = pytest.mark.parametrize("length", [1, 2, 100, 256, 257, T, 3000])
WIDTHS = pytest.mark.parametrize("width", [20, 200])
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def documents(length: int = T) -> Rows:
    """Documents that end inside runs, at their ends, and after one token; padding."""
    rows = [[0] * 100 + [1] * 28 + [2] + [3] * 171, [0] * 3 + [1] * 253 + [2] * 30 + [-1] * 14]
    rows = torch.tensor(rows, dtype=torch.int32, device="cuda").repeat(1, -(-length // T))
    blocks = torch.arange(rows.shape[1], device="cuda") // T * 10
    rows = torch.where(rows < 0, rows, rows + blocks).to(torch.int32)
    return Rows.of(Tokens.packed(rows[:, :length].contiguous()))


def case(scan: str, length: int, *, width: int = 200, dtype=torch.float32, packed: bool = False, seed: int = 0):
    """Leaves, and what else the scan is given."""
    g = torch.Generator("cuda").manual_seed(seed)
    rows = documents(length) if packed else Rows()

    def noise(*shape):
        return torch.randn(shape, generator=g, device="cuda")

    if scan == "rg_lru":
        u, decay = noise(2, length, width), -F.softplus(4 * noise(2, length, width)) - 1e-3
        leaves = [rows.without_padding(u), rows.without_padding(decay), noise(2, width)]
        return [t.requires_grad_() for t in leaves], rows
    wide = noise(2, length, 2 * width + 8).to(dtype)
    leaves = [wide, noise(width).exp(), noise(width), noise(2, width), noise(2, width).exp(), noise(2, width)]
    return [t.requires_grad_() for t in leaves], rows


def outcome(scan: str, function, leaves, rows: Rows, *, state: bool, grads: bool = True):
    """All results, and the gradients of a fixed random combination of those that have one."""
    if scan == "rg_lru":
        u, decay, first = leaves
        outs = function(u, decay, chunk=64, segments_BT=rows.segments_BT, state_BI=first if state else None)
        used, given = list(outs), leaves[: 2 + state]
    else:
        wide, rate, first, *past = leaves
        I = rate.shape[0]
        k, v = wide[..., :I], wide[..., I : 2 * I]
        real = rows.without_padding(torch.ones_like(wide[..., :1]))
        y, sums = function(
            k, v, rate, first, real, chunk=64, segments_BT=rows.segments_BT, past=tuple(past) if state else None
        )
        # What comes at padding is nobody's.
        used, outs, given = [rows.without_padding(y), *sums[:2]], [y, *sums], leaves[: 6 if state else 3]
        outs[0] = used[0]
    if not grads:
        return list(outs)
    weigh = torch.Generator("cuda").manual_seed(7)
    total = sum((o.float() * torch.randn(o.shape, generator=weigh, device="cuda")).sum() for o in used)
    return [*outs, *torch.autograd.grad(total, given)]


def held(what: str, found, truth, limit: float):
    errors = [error(a, b) for a, b in zip(found, truth, strict=True)]
    print(what, *(f"{e:.1e}" for e in errors))
    assert all(t.isfinite().all() for t in found), (what, [t.isfinite().all().item() for t in found])
    assert max(errors) < limit, (what, [f"{e:.1e}" for e in errors], f"limit {limit:.0e}")


@SCANS
@PACKED
@STATE
@WIDTHS
@LENGTHS
def test_scan(scan, packed, state, width, length):
    leaves, rows = case(scan, length, width=width, packed=packed)
    found, truth = (
        outcome(scan, function, leaves, rows, state=state) for function in (PARTS[scan](), DEFINITIONS[scan])
    )
    # A gradient by a rate adds up what nearly cancels out.
    limit = LIMIT[torch.float32] * (10 if length > T else 1)
    held(f"{scan} packed {packed} state {state} width {width} length {length}: {RESULTS[scan]}", found, truth, limit)


@PACKED
@STATE
def test_means_of_bfloat16(packed, state):
    leaves, rows = case("wkv4", T, dtype=torch.bfloat16, packed=packed)
    found = outcome("wkv4", PARTS["wkv4"](), leaves, rows, state=state)
    assert found[0].dtype == torch.bfloat16 and found[4].dtype == torch.bfloat16
    wide = [t.detach().float().requires_grad_() for t in leaves]
    truth = outcome("wkv4", DEFINITIONS["wkv4"], wide, rows, state=state)
    held(f"wkv4 bfloat16 packed {packed} state {state}:", found, truth, LIMIT[torch.bfloat16])


@SCANS
def test_steps_are_the_row(scan):
    """Pieces of a row through the state, to single tokens."""
    leaves, rows = case(scan, 40)
    part = PARTS[scan]()
    with torch.no_grad():
        whole = outcome(scan, part, leaves, rows, state=True, grads=False)
        state, outs = leaves[2:] if scan == "rg_lru" else leaves[3:], []
        for a, b in ((0, 17), (17, 18), (18, 19), (19, 40)):
            some = [t[:, a:b] for t in leaves[: 2 if scan == "rg_lru" else 1]]
            some += [*([] if scan == "rg_lru" else leaves[1:3]), *state]
            y, *state = outcome(scan, part, some, rows, state=True, grads=False)
            outs.append(y)
    held(f"{scan} in pieces: {RESULTS[scan]}", [torch.cat(outs, 1), *state], whole, 1e-5)


@pytest.mark.parametrize("decay", [-1e38, -200.0, -1e-30, 0.0])
def test_extreme_decays_are_finite(decay):
    leaves, rows = case("rg_lru", T, packed=True)
    leaves[1] = torch.full_like(leaves[1], decay).requires_grad_()
    found, truth = (
        outcome("rg_lru", function, leaves, rows, state=True)
        for function in (PARTS["rg_lru"](), DEFINITIONS["rg_lru"])
    )
    held(f"rg_lru decay {decay}: {RESULTS['rg_lru']}", found, truth, 1e-4)


@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
def test_extreme_keys_are_finite(size):
    leaves, rows = case("wkv4", T)
    leaves[0] = (leaves[0].detach() * size).requires_grad_()
    found, truth = (
        outcome("wkv4", function, leaves, rows, state=True) for function in (PARTS["wkv4"](), DEFINITIONS["wkv4"])
    )
    # Logarithms have only so many digits behind the point.
    held(f"wkv4 keys {size}: {RESULTS['wkv4'][:4]}", found[:4], truth[:4], max(1e-4, 1e-6 * size))
    assert all(t.isfinite().all() for t in found)


def test_a_document_sees_nothing_of_another():
    """Not a bit, where the other document's numbers are a million times as large."""
    leaves, _ = case("rg_lru", T)
    segments = (torch.arange(T, device="cuda") >= 131).int().expand(2, T)
    other = [t.detach().clone() for t in leaves]
    other[0][:, :131] *= 1e6
    with torch.no_grad():
        (h, last), (h_other, last_other) = (
            outcome("rg_lru", PARTS["rg_lru"](), now, Rows(segments_BT=segments), state=True, grads=False)
            for now in (leaves, other)
        )
    assert not torch.equal(h[:, :131], h_other[:, :131])
    assert torch.equal(h[:, 131:], h_other[:, 131:]) and torch.equal(last, last_other)


@SCANS
@pytest.mark.parametrize("length", [1, 100, T])
def test_scan_in_a_cuda_graph(scan, length):
    """Forward and backward: nothing waits for the device."""
    packed = scan == "rg_lru"
    (given, rows), (other, _) = (case(scan, length, packed=packed, seed=seed) for seed in (0, 1))

    def run(*tensors):
        outs = outcome(scan, PARTS[scan](), tensors, rows, state=True, grads=False)
        outs = outs[:2] if scan == "rg_lru" else outs[:3]
        total = sum((o.float() * torch.linspace(-1, 1, o.numel(), device="cuda").view_as(o)).sum() for o in outs)
        return [*outs, *torch.autograd.grad(total, tensors)]

    expected = [t.clone() for t in run(*(t.detach().clone().requires_grad_() for t in other))]
    found = replayed(run, given, [t.detach() for t in other])
    held(f"{scan} length {length} in a graph: {RESULTS[scan]}", found, expected, 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@SCANS
@PACKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_compiles_whole(scan, packed, dtype):
    """Training, a prompt and steps of a layer, by inductor."""
    fields = dict(blocks=4) if scan == "rg_lru" else {}
    plain, ours = (module(scan, d_model=128, **fields).cuda() for _ in range(2))
    if dtype == torch.bfloat16:
        ours = ours.to(dtype)
        plain.load_state_dict(ours.state_dict())
    ours.parts["scan"] = PARTS[scan]()
    rows = torch.tensor([[0] * 100 + [1] * 185 + [-1] * 15, [0] * 300], dtype=torch.int32, device="cuda")
    tokens = Tokens.packed(rows) if packed else Tokens.plain(2, T, device="cuda")
    x = torch.randn(2, T, 128, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)
    whole = torch.compile(ours, fullgraph=True, dynamic=False)

    def found(function, layer, x):
        y = function(x, tokens)
        if packed:
            y = y * (rows >= 0)[..., None]
        return [y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))]

    limit = 1e-3 if dtype == torch.float32 else 6e-2
    held(f"{scan} {dtype} packed {packed}: y and gradients of {[n for n, _ in ours.named_parameters()]}",
         found(whole, ours, x), found(plain, plain, x.float()), limit)
    with torch.no_grad():
        results = []
        for function, layer, given in (whole, ours, x), (plain, plain, x.float()):
            state = layer.init_state(2, dtype=given.dtype, device="cuda")
            pieces = ((0, 100), (100, 101), (101, 102))
            ys = [function(given[:, a:b], Tokens.plain(2, b - a, start=a, device="cuda"), state) for a, b in pieces]
            results.append([*ys, *(t for t in state.values() if t.is_floating_point())])
    held(f"{scan} {dtype} a prompt and steps, and the states after them:", *results, limit)
