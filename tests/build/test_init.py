"""Initial values: the laws, measured; the same bits whatever was built, where, and in which order."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import D_MODEL, EVERYTHING, graph

from mambadsl.build.init import LAWS, draw, drawn, initialise, materialise, param_groups
from mambadsl.build.model import build
from mambadsl.kinds.kind import Init, Weight
from mambadsl.kinds.registry import all_kinds


def values(init: Init, *shape: int, stack: str = "M A F A", seed: int = 0, **settings) -> torch.Tensor:
    return draw(Weight("w", shape, init), graph(stack, **settings), path="some.path", seed=seed)


def test_every_law_that_a_kind_declares_exists():
    model = build(graph(EVERYTHING), device="meta")
    assert {w.init.law for w in model.weights.values()} <= set(LAWS)
    assert len(all_kinds()) >= 5


def test_normal_has_the_models_std_and_residual_projections_less():
    std = 0.02
    options = dict(init_std=std)
    assert values(Init("normal"), 400, 300, **options).std().item() == pytest.approx(std, rel=0.02)
    assert abs(values(Init("normal"), 400, 300, **options).mean().item()) < 2e-4
    own = Init.of("normal", std=0.5)
    assert values(own, 400, 300, **options).std().item() == pytest.approx(0.5, rel=0.02)
    residual = Init("normal", residual=True)
    assert values(residual, 400, 300, **options).std().item() == pytest.approx(std / math.sqrt(4), rel=0.02)
    off = dict(**options, scale_residual_init="false")
    assert values(residual, 400, 300, **off).std().item() == pytest.approx(std, rel=0.02)


def test_residual_additions_are_counted_not_layers_of_weights():
    model = build(graph("S M S S M+A F", d_model=48, init_std=0.02))
    out = model.tensors()["stack.1.mixer.out_proj.weight"]
    assert out.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.06)
    assert model.tensors()["stack.1.mixer.in_proj.weight"].std().item() == pytest.approx(0.02, rel=0.04)


def test_uniform_and_constants():
    u = values(Init.of("uniform", bound=0.5), 1000, 20)
    assert u.min() >= -0.5 and u.max() <= 0.5
    assert u.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.02)
    assert (values(Init("zeros"), 7) == 0).all() and (values(Init("ones"), 7) == 1).all()
    assert (values(Init.of("const", value=2.5), 7) == 2.5).all()


def test_ramps_and_idle_rows():
    torch.testing.assert_close(values(Init.of("ending", last=-1), 4), torch.tensor([0.0, 0, 0, -1]))
    torch.testing.assert_close(values(Init.of("ramp", low=3, high=6), 4), torch.tensor([3.0, 4, 5, 6]))
    idle = values(Init.of("normal", std=0.5, idle=3), 9, 400)
    assert not idle[6:].any() and idle[:6].std().item() == pytest.approx(0.5, rel=0.1)


def test_a_log_of_both_mambas():
    a = values(Init.of("a_uniform", low=1, high=16), 20_000).exp()
    assert a.min() >= 1 - 1e-5 and a.max() <= 16 + 1e-4
    assert a.mean().item() == pytest.approx(8.5, rel=0.02)
    rows = values(Init("a_arange"), 3, 5).exp()
    torch.testing.assert_close(rows, torch.arange(1.0, 6).expand(3, 5))


def test_dt_bias_gives_dt_in_its_range():
    dt = F.softplus(values(Init.of("dt_bias", low=0.001, high=0.1, floor=1e-4), 20_000).double())
    assert dt.min() >= 0.001 * (1 - 1e-4) and dt.max() <= 0.1 * (1 + 1e-4)
    # Log-uniform: a half of it below the geometric mean.
    assert (dt < 0.01).double().mean().item() == pytest.approx(0.5, abs=0.02)
    floored = F.softplus(values(Init.of("dt_bias", low=1e-6, high=1e-5, floor=1e-4), 100).double())
    torch.testing.assert_close(floored, torch.full_like(floored, 1e-4), rtol=1e-3, atol=0)


def test_radii_are_uniform_in_the_ring():
    kept = (-F.softplus(values(Init.of("radius", low=0.9, high=0.999), 20_000).double())).exp()
    assert kept.min() >= 0.9 - 1e-5 and kept.max() <= 0.999 + 1e-5
    assert kept.square().mean().item() == pytest.approx((0.81 + 0.999**2) / 2, rel=1e-3)


def test_rwkv_begins_by_channel_and_by_depth():
    """Four layers that see other tokens: depth 0 and 2 of them mix in time."""
    tensors = build(graph("Mean Channels Mean Channels")).tensors()
    width, inner = D_MODEL, 12
    for place, depth in (0, 0), (2, 2):
        series = torch.arange(width) / width
        share = series ** (1 - depth / 4)
        at = f"stack.{place}.mixer"
        torch.testing.assert_close(tensors[f"{at}.mix_k"], share)
        torch.testing.assert_close(tensors[f"{at}.mix_v"], share + 0.3 * depth / 3)
        torch.testing.assert_close(tensors[f"{at}.mix_r"], share**0.5)
        speeds = 8 * (torch.arange(inner) / (inner - 1)) ** (0.7 + 1.3 * depth / 3) - 5
        torch.testing.assert_close(tensors[f"{at}.time_decay"], speeds)
        first = tensors[f"{at}.time_first"].exp() / 0.3
        torch.testing.assert_close(first[:3], torch.tensor([0.0, 0.5, -0.5]).exp())
    torch.testing.assert_close(tensors["stack.3.mixer.mix_k"], (torch.arange(width) / width) ** 0.25)


def test_slopes_fall_by_head_and_by_depth():
    """Depth counts the layers that mix tokens, at the first use of a shared one; MTP stands where the last does."""
    more = "shared Fix = lightning(heads=4, head_dim=6)\nmtp(depths=1) { Fixed }"
    model = graph("Fixed F M Fix A Fixed F Fix", more=more)
    series = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])
    for path, before in ("stack.0", 0), ("shared.Fix", 2), ("stack.5", 4), ("mtp.0.0", 5):
        slope = draw(Weight("slope", (4,), Init("slopes")), model, path=f"{path}.mixer.slope", seed=0)
        torch.testing.assert_close(slope, series * (1 - before / (6 - 1 + 1e-5) + 1e-5), rtol=1e-6, atol=0)


def test_built_mambas_have_these_values():
    tensors = build(graph("M R")).tensors()
    for name in "stack.0.mixer.dt_bias", "stack.1.mixer.dt_proj.bias":
        dt = F.softplus(tensors[name])
        assert dt.min() >= 0.00099 and dt.max() <= 0.101
    torch.testing.assert_close(tensors["stack.1.mixer.A_log"][5].exp(), torch.arange(1.0, 5))
    assert (tensors["stack.0.mixer.D"] == 1).all()


def same(a: dict, b: dict) -> None:
    assert set(a) <= set(b)
    for path in a:
        assert a[path].dtype == b[path].dtype and torch.equal(a[path], b[path]), path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_meta_then_materialise_is_a_direct_build(dtype):
    direct = build(graph(EVERYTHING), dtype=dtype, seed=3)
    later = materialise(build(graph(EVERYTHING), dtype=dtype, device="meta"), device="cpu", seed=3)
    same(direct.tensors(), later.tensors())
    other = build(graph(EVERYTHING), dtype=dtype, seed=4)
    assert not torch.equal(direct.embed.weight, other.embed.weight)


def test_values_depend_on_seed_and_path_only():
    """Not on other layers, on torch's own generator, or on what was there before."""
    torch.manual_seed(1)
    options = dict(scale_residual_init="false")
    short, long = build(graph("M A", **options)), build(graph("M A F F", **options))
    same(short.tensors(), long.tensors())
    before = torch.random.get_rng_state()
    again = initialise(build(graph("M A", **options), seed=9), seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    same(short.tensors(), again.tensors())
    third, fourth = (long.tensors()[f"stack.{i}.mixer.up_proj.weight"] for i in (2, 3))
    assert not torch.equal(third, fourth)


#: Beside norms, what does not decay.
SMALL = (
    "A_log", "D", "dt_bias", "a_param", "bias", "b_bias", "c_bias", "rank_x", "rank_z", "rank_out", "sinks", "lambda",
    "input_bias", "forget_bias", "mix_k", "mix_v", "mix_r", "time_decay", "time_first", "temperature",
    "carry_scale",
)


def test_parameter_groups_are_the_declared_ones():
    model = build(graph(EVERYTHING, tie_embeddings="true"), device="meta")
    decay, rest = param_groups(model, weight_decay=0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len({id(p) for g in (decay, rest) for p in g["params"]}) == len(list(model.parameters()))
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    for path in rest["names"]:
        assert path.split(".")[-1] in SMALL or "norm" in path or "_affine." in path, path
    for path in decay["names"]:
        assert not path.endswith(("A_log", "D", "a_param", "bias")) and "norm" not in path, path
    assert "embed.weight" in decay["names"] and "stack.0.mixer.A_log" in rest["names"]
    torch.optim.AdamW(param_groups(build(graph("M A"))))


@pytest.mark.parametrize("cores, processes", [(1, "1"), (7, "1"), (8, "2"), (2, "8")])
def test_however_many_are_drawn_at_once_the_bits_are_the_same(monkeypatch, cores, processes):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    model = build(graph(EVERYTHING), device="meta")
    found = dict(drawn(model.weights, model.graph, seed=5))
    assert set(found) == set(model.weights)
    assert all(torch.equal(value, draw(model.weights[path], model.graph, path=path, seed=5))
               for path, value in found.items())
    sizes = [value.numel() for value in found.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_who_takes_a_few_values_waits_for_no_more(monkeypatch):
    begun = []
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setitem(LAWS, "zeros", lambda shape, generator: begun.append(shape) or torch.zeros(shape))
    weights = {f"{n}.w": Weight("w", (n,), Init("zeros")) for n in range(1, 20)}
    values = drawn(weights, graph("M"), seed=0)
    assert [path for path, _ in (next(values), next(values))] == ["19.w", "18.w"]
    values.close()
    assert len(begun) <= 2 + 3
