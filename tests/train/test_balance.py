"""Experts are kept balanced in training: the same however a step is cut, and even after a while. (On many processes:
`test_equal.py` and `test_tensor.py`, whose models have balanced experts.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_cases import COMMON, balanced, go, told, weights

import mambadsl
from mambadsl.train.loop import Keeping
from mambadsl.train.run import train
from mambadsl.train.settings import Settings

MODEL = """
model experts { vocab = 256  d_model = 16  init_std = SIZE }
layer E = moe(experts=8, top_k=2, d_ff=8, router=ROUTER, BALANCE)
stack { E E }
"""


def run(folder: Path, *, router: str, balance: str, size: float = 0.02, **settings) -> Path:
    """A run in a folder, for its log and saves; the text is this file's."""
    text = MODEL.replace("SIZE", str(size)).replace("ROUTER", router).replace("BALANCE", balance)
    train(
        mambadsl.load(text=text), [__file__], folder, Settings(**{**COMMON, **settings}),
        keeping=Keeping(save_every=0, quiet=True),
    )
    return folder


WAYS = {"accumulated": {"microbatch": 2}, "row by row": {"microbatch": 1}, "recomputed": {"recompute": True}}


@pytest.mark.parametrize("model", ["untied", "sharing"])
def test_however_a_step_is_done(tmp_path, model):
    go("plain", {"model": model, "settings": {}}, tmp_path)
    truth = weights(tmp_path / "plain")
    assert any(path.endswith("router.bias") and value.any() for path, value in truth.items())
    for way, settings in WAYS.items():
        go(way, {"model": model, "settings": settings}, tmp_path)
        assert told(tmp_path / way)[0] == pytest.approx(told(tmp_path / "plain")[0], rel=2e-5)
        for step, expected in zip(balanced(tmp_path / way), balanced(tmp_path / "plain"), strict=True):
            assert step == pytest.approx(expected, rel=2e-5)
        for path, value in weights(tmp_path / way).items():
            torch.testing.assert_close(value, truth[path], rtol=0, atol=2e-5, msg=lambda m: f"{way}, {path}: {m}")


@pytest.mark.parametrize("router", ["sigmoid", "mlp(d_router=8, skip=false)"])
def test_a_bias_evens_skewed_routers(tmp_path, router):
    """Nothing is learned but the bias. Its steps are as large as what divides the scores."""
    folder = run(tmp_path, router=router, balance="bias_rate=0.02", size=0.5, lr=0.0, steps=40, length=64)
    imbalance = [step[0] for step in balanced(folder)]
    assert imbalance[0] > 2 and max(imbalance[-5:]) < 1.35


def test_a_loss_evens_a_router(tmp_path):
    runs = {
        name: balanced(run(tmp_path / name, router="softmax", balance=balance, size=0.3, steps=40, lr=1e-2))
        for name, balance in (("left alone", "aux_loss=0"), ("balanced", "aux_loss=0.1, z_loss=0.01"))
    }
    assert [len(steps[0]) for steps in runs.values()] == [1, 3]
    (first, aux, z), (last, aux_at_last, z_at_last) = runs["balanced"][0], runs["balanced"][-1]
    assert last < 1.5 < runs["left alone"][-1][0] and last < first
    assert aux_at_last < 1.05 < aux and z_at_last < z


def test_goes_on_with_its_biases(tmp_path):
    how = dict(router="sigmoid", balance="bias_rate=0.01, aux_loss=0.01", schedule="constant")
    truth = run(tmp_path / "whole", steps=4, **how)
    run(tmp_path / "parts", steps=2, **how)
    parts = run(tmp_path / "parts", steps=4, **how)
    assert balanced(parts) == balanced(truth)
    for path, value in weights(truth).items():
        assert torch.equal(weights(parts)[path], value), path
