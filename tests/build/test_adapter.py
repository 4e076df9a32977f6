"""Adapters: up(down(x)) beside a projection, of a layer's own or of one use of a shared one."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from small_models import D_MODEL, graph, ids, made

from mambadsl.build.init import materialise
from mambadsl.build.model import build
from mambadsl.build.state import describe

TUNED = "shared One = G(adapter=lora(rank=3))"


def test_an_adapter_adds_a_product_of_its_factors():
    (_, sub), = made("Low").sublayers()
    weights = dict(sub.mixer.named_parameters())
    x, described = torch.randn(2, 6, D_MODEL), describe((2, 6))
    merged = copy.deepcopy(sub)
    merged.mixer.parts = dict(merged.mixer.REFERENCE)
    with torch.no_grad():
        for name in "in_proj", "out_proj":
            down, up = (weights[f"adapter.{name}.{factor}.weight"] for factor in ("down", "up"))
            assert down.shape[0] == up.shape[1] == 2
            merged.get_parameter(f"mixer.{name}.weight").add_(up @ down)
    torch.testing.assert_close(sub(x, None, described), merged(x, None, described), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(sub.mixer(x, described), made("M").get_submodule("stack.0.mixer")(x, described))


def test_each_fused_part_may_have_factors_of_its_own():
    model = made("Parts", more="layer Parts = A(qkv_bias=true, adapter=lora(rank=3, targets=[qkv_proj], per=segment))")
    (_, sub), = model.sublayers()
    mixer, x = sub.mixer, torch.randn(2, 5, D_MODEL)
    down, up = mixer.adapter.qkv_proj.down.weight, mixer.adapter.qkv_proj.up.weight
    assert down.shape == (9, D_MODEL) and up.shape == (24 + 12 + 12, 3)
    found = mixer.parts["qkv_proj"](x, mixer.qkv_proj.weight, mixer.qkv_proj.bias)
    for i, part in enumerate((slice(0, 24), slice(24, 36), slice(36, 48))):
        low = F.linear(x, down[3 * i : 3 * i + 3])
        wanted = F.linear(x, mixer.qkv_proj.weight[part], mixer.qkv_proj.bias[part]) + F.linear(low, up[part])
        torch.testing.assert_close(found[..., part], wanted)


def test_uses_of_a_shared_layer_differ_by_their_adapters_alone():
    model = made("One M One One(adapter=none)", more=TUNED)
    names = set(model.state_dict())
    assert "shared.One.mixer.gate_up_proj.weight" in names and "stack.2.mixer.adapter.down_proj.up.weight" in names
    assert not any(name.startswith(("stack.3.", "shared.One.mixer.adapter")) for name in names)
    x, described = torch.randn(1, 4, D_MODEL), describe((1, 4))
    first, _, second, plain = (sub for _, sub in model.sublayers())
    given = [sub(x, None, described) for sub in (first, second, plain)]
    assert not torch.allclose(given[0], given[1]) and not torch.allclose(given[0], given[2])
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("up.weight"):
                tensor.zero_()
    assert all(torch.equal(sub(x, None, described), given[2]) for sub in (first, second, plain))


def test_at_first_an_adapter_changes_nothing():
    plain, adapted = build(graph("M")), build(graph("Low"))
    adapted.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(adapted(ids(1, 5)), plain(ids(1, 5)))


def test_copies_moves_and_materialised_models_have_their_own_factors():
    text = graph("One Low One", more=TUNED)
    model, tokens = made("One Low One", more=TUNED), ids(1, 6)
    twin = copy.deepcopy(model)
    before = model(tokens)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(twin(tokens), before)
    assert not model(tokens).any()
    late = materialise(build(text, device="meta"), seed=3)
    torch.testing.assert_close(late(tokens), build(text, seed=3)(tokens))
    narrow = copy.deepcopy(twin).bfloat16()
    assert (narrow(tokens) - before).abs().mean() < 0.03 * before.abs().mean()


def test_every_factor_is_trained():
    model = made("One Tuned Low One Tuned", more=TUNED)
    model.loss(ids(2, 9)).backward()
    factors = {name: p for name, p in model.named_parameters() if ".adapter." in name}
    assert len(factors) == 2 * 4 + 2 * 4 + 4
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in factors.values())
