"""mamba_ssm's kernels of Mamba-3 on a GPU, in the slot `mamba3.core`, against the reference.

A layer is held to the definition in float32 with the same (rounded) weights, by the relative size of the difference:
to a limit, or, where that is more, to a share of how far off the definition in bfloat16 is (gradients of step sizes add
up what nearly cancels out). Kernels multiply in TF32 for float32. `-s` prints how far off each result was.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from kind_values import module
from on_gpu import NEEDS_GPU, error, replayed
from small_models import shaken

from mambadsl.build.model import build
from mambadsl.compile import load as load_model
from mambadsl.kinds.tokens import Tokens
from mambadsl.run.decode import Decoder
from mambadsl.run.step import TrainStep

pytestmark = NEEDS_GPU
siso = pytest.importorskip("mambadsl.parts.mamba_ssm.siso", reason="needs triton")


@pytest.fixture(autouse=True, scope="module")
def _installed():
    try:
        siso.make_siso()
    except ImportError as reason:
        pytest.skip(f"needs mamba_ssm: {reason}")


T, D = 300, 96
FORMS = {
    "gate": dict(heads=4, head_dim=32, d_state=64, groups=2),
    "norm": dict(heads=2, head_dim=64, d_state=32, rope_fraction=1, gated_norm="before_gate"),
    "smallest": dict(heads=3, head_dim=16, d_state=16),
    "published": dict(heads=2, head_dim=64, d_state=128),
}
LIMIT = {torch.float32: 1e-2, torch.bfloat16: 4e-2, torch.float16: 1e-2}
SHARE = {torch.float32: 0.6, torch.bfloat16: 2, torch.float16: 0.6}
EACH = pytest.mark.parametrize("form", FORMS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
#: Kernels of the largest blocks take longest to compile: once.
CASES = pytest.mark.parametrize("form, dtype", [
    (form, dtype) for form in FORMS for dtype in (torch.float32, torch.bfloat16)
    if form != "published" or dtype == torch.bfloat16
], ids=str)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
STATE = pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
#: Documents that end inside chunks, at their ends, and after one token; padding; one that goes on from the state.
SEGMENTS = [[0] * 100 + [1] * 28 + [2] + [3] * 171, [5] * 3 + [6] * 253 + [7] * 30 + [-1] * 14]


def noise(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def documents(length: int = T):
    return torch.tensor(SEGMENTS, dtype=torch.int32, device="cuda")[:, :length].contiguous()


def layers(form: str, dtype: torch.dtype):
    """The part in `dtype`; with its weights the definition in float32, and the definition in bfloat16."""
    ours, plain, narrow = (module("mamba3", d_model=D, **FORMS[form]).cuda() for _ in range(3))
    ours, narrow = ours.to(dtype), narrow.to(torch.bfloat16)
    for layer in plain, narrow:
        layer.load_state_dict(ours.state_dict())
    ours.parts["core"] = siso.make_siso()
    return ours, plain, narrow


def results(layer, dtype, *, packed: bool, state: bool, length: int = T, grads: bool = True, function=None):
    """y and the states, gradients of a fixed random combination of them, by name."""
    tokens, real = Tokens.plain(2, length, device="cuda"), torch.ones(2, length, device="cuda")
    if packed:
        tokens, real = Tokens.packed(documents(length)), documents(length) >= 0
    wide = layer.dtype
    leaves = {"dx": noise(2, length, D).to(dtype).to(wide).requires_grad_()}
    now = None
    if state:
        now = layer.init_state(2, dtype=wide, device="cuda")
        for n, (name, t) in enumerate(now.items()):
            started = noise(*t.shape, seed=n).to(dtype).to(t.dtype)
            leaves[f"d {name}"] = now[name] = started.requires_grad_() if grads else started
    with torch.set_grad_enabled(grads):
        y = (layer if function is None else function)(leaves["dx"], tokens, now)
    outs = {"y": y * real[..., None].to(y.dtype)}
    outs |= {name: t for name, t in now.items() if t.is_floating_point()} if state else {}
    if not grads:
        return outs
    total = sum((o.float() * noise(*o.shape, seed=7)).sum() for o in outs.values())
    leaves |= dict(layer.named_parameters())
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return outs | dict(zip(leaves, found))


def held(what: str, found, truth, limit: float, narrow=None, share: float = 0):
    """By name: which result is off, and by how much. narrow: the definition's own in bfloat16."""
    assert found.keys() == truth.keys()
    errors = {name: error(found[name], truth[name]) for name in truth}
    print(what, *(f"{name} {e:.1e}" for name, e in errors.items()))
    infinite = [name for name, t in found.items() if not t.isfinite().all()]
    assert not infinite, (what, infinite)
    bound = {name: max(limit, share * error(narrow[name], truth[name]) if narrow else 0) for name in truth}
    if "dt_bias" in bound:
        # All tokens' step sizes in one sum that nearly cancels out: TF32 alone moves it by 1 %, bfloat16 by 10.
        bound["dt_bias"] *= 4
    off = {name: f"{e:.1e} of {bound[name]:.1e}" for name, e in errors.items() if not e <= bound[name]}
    assert not off, (what, off, "of all:", {name: f"{e:.1e}" for name, e in errors.items()})


def near_the_definition(what: str, form: str, dtype: torch.dtype, *, times: float = 1, **how):
    ours, plain, narrow = layers(form, dtype)
    found = results(ours, dtype, **how)
    assert found["y"].dtype == dtype
    truth, rounded = results(plain, dtype, **how), results(narrow, torch.bfloat16, **how)
    held(f"{what} {form} {dtype} {how}:", found, truth, times * LIMIT[dtype], rounded, times * SHARE[dtype])


@CASES
@PACKED
@STATE
def test_layer(form, dtype, packed, state):
    near_the_definition("layer", form, dtype, packed=packed, state=state)


def test_float16():
    near_the_definition("layer", "gate", torch.float16, packed=True, state=True)


@DTYPES
@STATE
@pytest.mark.parametrize("length", [1, 2, 31, 64, 65])
def test_lengths(length, state, dtype):
    # The fewer the tokens, the more a single one's rounding.
    near_the_definition("length", "smallest", dtype, times=2, packed=False, state=state, length=length)


@CASES
def test_without_gradients(form, dtype):
    """What inference runs: nothing is kept."""
    for state in False, True:
        near_the_definition("no gradients", form, dtype, packed=True, state=state, grads=False)


@CASES
def test_tokens_after_a_prompt(form, dtype):
    found = []
    for layer in layers(form, dtype):
        state, ys, x = layer.init_state(2, dtype=layer.dtype, device="cuda"), [], noise(2, T, D).to(dtype)
        with torch.no_grad():
            for a, b in (0, 100), (100, 101), (101, 102), (102, 230), (230, 231):
                ys.append(layer(x[:, a:b].to(layer.dtype), Tokens.plain(2, b - a, start=a, device="cuda"), state))
        found.append({"y": torch.cat(ys, 1), **{n: t for n, t in state.items() if t.is_floating_point()}})
    ours, plain, narrow = found
    held(f"{form} {dtype} a prompt and steps:", ours, plain, LIMIT[dtype], narrow, SHARE[dtype])


@pytest.mark.parametrize("fill", [-1e3, 0.0, 1e3])
def test_extreme_inputs_are_finite(fill):
    for dtype in torch.float32, torch.bfloat16:
        ours = layers("gate", dtype)[0]
        x = torch.full((2, T, D), fill, device="cuda", dtype=dtype).requires_grad_()
        y = ours(x, Tokens.packed(documents()))
        grads = torch.autograd.grad(y.float().sum(), [x, *ours.parameters()])
        names = ["y", "dx", *(name for name, _ in ours.named_parameters())]
        infinite = [name for name, t in zip(names, (y, *grads)) if not t.isfinite().all()]
        assert not infinite, (fill, dtype, infinite)


def test_a_document_sees_nothing_of_another():
    """Not a bit, where the other document's x is a million times as large."""
    layer = layers("gate", torch.float32)[0]
    segments = (torch.arange(T, device="cuda") >= 131).int().expand(2, T)
    x, found = noise(2, T, D), []
    for size in 1, 1e6:
        # Of x alone: decays are sums over a chunk, and round together.
        hidden = torch.nn.functional.linear(x, layer.in_proj.weight.detach())
        hidden[:, :131, 128:256] *= size
        layer.parts["in_proj"] = lambda *_, hidden=hidden: hidden
        with torch.no_grad():
            found.append(layer(x, Tokens.packed(segments)))
    assert not torch.equal(found[0][:, :131], found[1][:, :131])
    assert torch.equal(found[0][:, 131:], found[1][:, 131:])


@EACH
def test_in_a_cuda_graph(form):
    """Packed rows, forward and backward: nothing waits for the device."""
    ours = layers(form, torch.bfloat16)[0]
    tokens, real = Tokens.packed(documents()), (documents() >= 0)[..., None]

    def run(x):
        y = ours(x, tokens) * real
        # A graph that is kept would bind the parameters to the stream that it was made on.
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *ours.parameters()])]

    given, other = (noise(2, T, D, seed=seed).bfloat16() for seed in (0, 1))
    names = ["y", "dx", *(name for name, _ in ours.named_parameters())]
    expected = [t.clone() for t in run(other.clone().requires_grad_())]
    found = replayed(run, [given.requires_grad_()], [other])
    held(f"{form} in a graph:", dict(zip(names, found)), dict(zip(names, expected)), 1e-3)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["gate", "norm"])
@DTYPES
@PACKED
def test_a_layer_compiles_whole(form, dtype, packed):
    """Training, a prompt and steps of a layer, by inductor."""
    ours, plain, narrow = layers(form, dtype)
    whole = torch.compile(ours, fullgraph=True, dynamic=False)
    found = results(ours, dtype, packed=packed, state=False, function=whole)
    truth, rounded = (results(layer, layer.dtype, packed=packed, state=False) for layer in (plain, narrow))
    held(f"{form} {dtype} packed {packed} compiled:", found, truth, LIMIT[dtype], rounded, SHARE[dtype])
    with torch.no_grad():
        ends = []
        for function, layer in (whole, ours), (plain, plain), (narrow, narrow):
            state, x = layer.init_state(2, dtype=layer.dtype, device="cuda"), noise(2, T, D).to(dtype).to(layer.dtype)
            ys = [function(x[:, a:b], Tokens.plain(2, b - a, start=a, device="cuda"), state)
                  for a, b in ((0, 100), (100, 101), (101, 102))]
            ends.append({"y": torch.cat(ys, 1), **{n: t for n, t in state.items() if t.is_floating_point()}})
    held(f"{form} {dtype} compiled steps:", *ends[:2], LIMIT[dtype], ends[2], SHARE[dtype])


#: Both forms, one that the part refuses (several inputs a head), and what is beside them in a model.
MODEL = """
model turning {
  vocab = 256
  d_model = 64
  context = 128
  init_std = 0.15
}
layer M = mamba3(heads=8, head_dim=32, d_state=32, groups=2, chunk=32)
layer N = M(gated_norm=before_gate, rope_fraction=1)
layer Many = M(rank=2)
layer F = mlp(d_ff=128)
stack { [M F N]*2 Many F }
"""
ROWS = torch.tensor([
    [-1] * 5 + [0] * 30 + [-1] * 3 + [1] * 33 + [-1] * 9,
    [0] * 40 + [3] + [4] * 39,
], dtype=torch.int32)


@cache
def model(parts: str, dtype: str):
    """The same weights in all, rounded to bfloat16."""
    graph = load_model(text=MODEL).layers
    made = build(graph, parts=parts, dtype=dtype, device="cuda")
    if parts != "reference":
        chosen = {row.label: {c.slot: c.part for c in row.choices} for row in made.assignment.rows}
        assert {chosen[label]["mamba3.core"] for label in "MN"} == {"mamba_ssm.siso"}, (parts, chosen)
    made.load_state_dict(shaken(build(graph, dtype="bf16"), size=0.05).state_dict())
    return made.eval()


def batch(packed: bool):
    ids = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(0)).cuda()
    return {"tokens_BT": ids, **({"segments": ROWS.cuda()} if packed else {})}


def trained(parts: str, dtype: str, packed: bool):
    made = model(parts, dtype)
    made.zero_grad(set_to_none=True)
    loss = made.loss(**batch(packed))
    loss.backward()
    grads = {path: p.grad.float() for path, p in made.named_parameters()}
    return {"loss": loss.detach(), "all": torch.cat([g.flatten() for g in grads.values()])}


@PACKED
@pytest.mark.parametrize("parts", ["fused", "inference"])
def test_a_model(parts, packed):
    """No further from the reference in float32 than that in bfloat16, and half as much again."""
    truth, own = (trained("reference", dtype, packed) for dtype in ("fp32", "bf16"))
    for dtype in "fp32", "bf16":
        found = trained(parts, dtype, packed)
        off = {name: error(found[name], truth[name]) for name in truth}
        bound = {name: (0.6 if dtype == "fp32" else 1.5) * error(own[name], truth[name]) + 0.01 for name in truth}
        print(f"model {parts} {dtype} packed {packed}: {off} of {bound}")
        assert all(off[name] <= bound[name] for name in off), (parts, dtype, packed, off, bound)


def test_a_model_compiles_whole():
    made = model("fused", "bf16")
    eager = trained("fused", "bf16", True)
    made.zero_grad(set_to_none=True)
    loss = torch.compile(made.loss, fullgraph=True, dynamic=False)(**batch(True))
    loss.backward()
    found = {"loss": loss.detach(), "all": torch.cat([p.grad.float().flatten() for p in made.parameters()])}
    held("a compiled model:", found, eager, 6e-2)


def test_a_model_decodes():
    """Greedy tokens of the kernels' model are the reference's best, or near ties."""
    prompts = [[5, 9, 200, 31, 7, 7, 64], [3], [17, 250, 8, 90, 41, 2, 2, 111, 73, 19, 140, 6]]
    made, truth = model("inference", "fp32"), model("reference", "fp32")
    with Decoder(made, batch=3, capacity=64) as decoder:
        decoder.prefill(prompts)
        written = [list(row.tokens) for row in decoder.run(12)]
    for prompt, tokens in zip(prompts, written):
        with torch.no_grad():
            logits_TV = truth(torch.tensor([prompt + tokens], device="cuda"))[0, len(prompt) - 1 : -1]
        chosen_T = logits_TV.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        short = ((logits_TV.amax(-1) - chosen_T) / logits_TV.std(-1)).max().item()
        assert short < 0.04, (prompt, tokens, short)


def test_a_training_step_in_a_graph():
    """The second batch is a replay."""
    graph = load_model(text=MODEL).layers
    plain, captured = (build(graph, parts="fused", dtype="bf16", device="cuda") for _ in range(2))
    captured.load_state_dict(plain.state_dict())
    runs = TrainStep(plain), TrainStep(captured, graph=True)
    for seed in 0, 1:
        tokens = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(seed)).cuda()
        there, here = (run.step(tokens, segments=ROWS.cuda()) for run in runs)
        grads = {path: p.grad for path, p in plain.named_parameters()}
        off = {path: error(p.grad, grads[path]) for path, p in captured.named_parameters()}
        assert error(here, there) < 0.01 and max(off.values()) < 0.02, (seed, error(here, there), off)
