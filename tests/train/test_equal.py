"""Many processes train as one does: the same data and seed give the same losses and the same weights, within rounding,
for every mesh and schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_cases import MODELS, balanced, go, together, told, weights

import mambadsl
from mambadsl.train.deferred import defer
from mambadsl.train.pieces import compile_layers

TWO = {
    "data": {},
    "data bf16": {"dtype": "bf16"},
    "data by layers": {"gather": "layers", "microbatch": 2},
    "1f1b": {"stages": 2},
    "gpipe": {"stages": 2, "pipeline": "gpipe", "microbatch": 2},
    "interleaved": {"stages": 2, "pipeline": "interleaved"},
    "zb": {"stages": 2, "pipeline": "zb"},
    "zb recomputed": {"stages": 2, "pipeline": "zb", "recompute": True},
    "zbv": {"stages": 2, "pipeline": "zbv"},
}
FOUR = {
    "data": {"microbatch": 1},
    "stages x data": {"stages": 2},
    "1f1b": {"stages": 4},
    "interleaved x data": {"stages": 2, "pipeline": "interleaved"},
    "zbv x data": {"stages": 2, "pipeline": "zbv"},
    "zbv x data bf16": {"stages": 2, "pipeline": "zbv", "dtype": "bf16"},
}
#: Of losses, relative, and of weights. A rounding of bf16 is 2**-8 of a value.
NEAR = {"fp32": 2e-5, "bf16": 8e-4}


def compare(name: str, found: Path, truth: Path, *, near: float) -> None:
    (losses, held_out), (expected, expected_held_out) = told(found), told(truth)
    assert losses == pytest.approx(expected, rel=near), name
    assert held_out == pytest.approx(expected_held_out, rel=near), name
    for step, truths in zip(balanced(found), balanced(truth), strict=True):
        # In bfloat16, a token or two choose otherwise.
        assert step == pytest.approx(truths, rel=25 * near), name
    ours, theirs = weights(found), weights(truth)
    assert ours.keys() == theirs.keys(), name
    far = {
        path: (ours[path] - value).abs().max().item() for path, value in theirs.items() if path.startswith("model.")
    }
    assert max(far.values()) < near, (name, max(far, key=far.get))


@pytest.mark.parametrize("ranks, meshes, each", [(2, TWO, 2), (4, FOUR, 1)], ids=["two", "four"])
def test_as_one_process(tmp_path, ranks, meshes, each):
    """Each mesh trains some of the models, in turn, so that every model meets several meshes."""
    models, cases = list(MODELS), {}
    for k, (mesh, settings) in enumerate(meshes.items()):
        for model in (models[(k + j) % len(models)] for j in range(each)):
            cases[f"{model} {mesh}"] = {"model": model, "settings": settings}
    together(cases, tmp_path, ranks=ranks)
    alone = {(case["model"], case["settings"].get("dtype", "fp32")) for case in cases.values()}
    for model, dtype in sorted(alone):
        go(f"{model} alone {dtype}", {"model": model, "settings": {"dtype": dtype}}, tmp_path)
    for name, case in cases.items():
        dtype = case["settings"].get("dtype", "fp32")
        compare(name, tmp_path / name, tmp_path / f"{case['model']} alone {dtype}", near=NEAR[dtype])


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_weights_put_off_are_the_same(backend, fresh_compiler):
    """Projections have no gradient until it is taken, and then autograd's; everything else has its own at once."""
    text = MODELS["untied"] if backend is None else MODELS["untied"].replace("M X A E M F", "A F")
    models = [mambadsl.load(text=text).build(seed=1) for _ in range(2)]
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    deferred = defer(models[1])
    if backend is not None:
        compile_layers(models[1], backend=backend)
    for model in models:
        model.loss(tokens).backward()
    plain, put_off = (dict(model.named_parameters()) for model in models)
    waiting = {path for path, p in put_off.items() if p.grad is None}
    mamba = set() if backend else {"in_proj", "out_proj"}
    projections = {"qkv_proj", "o_proj", "up_proj", "down_proj"}
    assert {path.rsplit(".", 2)[-2] for path in waiting} == projections | mamba
    deferred.take()()
    for path, p in plain.items():
        torch.testing.assert_close(put_off[path].grad, p.grad, msg=lambda m: f"{path}: {m}")
