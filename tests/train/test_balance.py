"""Experts are kept balanced in training: the same however a step is cut, and even after a while. (On many processes:
`test_equal.py` and `test_tensor.py`, whose models have balanced experts.)"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_cases import COMMON, balanced, go, told, weights

import mambadsl
from mambadsl.train.export import export_run
from mambadsl.train.loop import Keeping
from mambadsl.train.run import train
from mambadsl.train.settings import Settings

MODEL = """
model experts { vocab = 256  d_model = 16  init_std = SIZE }
layer A = attention(heads=2)
layer E = moe(experts=8, d_ff=8, router=ROUTER, BALANCE)
stack { A E }
"""


def run(
    folder: Path, *, router: str, balance: str, size: float = 0.02, quiet: bool = True, **settings
) -> Path:
    """A run in a folder, for its log and saves, on words of its own making."""
    draw, data = random.Random(0), folder.with_suffix(".txt")
    words = ["".join(draw.choices("etaoinshr", k=draw.randint(2, 7))) for _ in range(200)]
    data.write_text(" ".join(draw.choices(words, k=4000)))
    text = MODEL.replace("SIZE", str(size)).replace("ROUTER", router).replace("BALANCE", balance)
    train(
        mambadsl.load(text=text), [data], folder, Settings(**{**COMMON, **settings}),
        keeping=Keeping(save_every=0, quiet=quiet),
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
            torch.testing.assert_close(value, truth[path], rtol=2e-5, atol=5e-5, msg=lambda m: f"{way}, {path}: {m}")


def late(folder: Path, figure: int = 0) -> float:
    """The mean of a figure over the last 10 steps."""
    return sum(step[figure] for step in balanced(folder)[-10:]) / 10


def test_a_bias_evens_a_skewed_router(tmp_path):
    """Nothing is learned but the bias."""
    how = dict(router="mlp(d_router=8, skip=false)", size=0.5, lr=0.0, steps=40, length=128)
    alone, moved = (run(tmp_path / str(rate), balance=f"bias_rate={rate}", **how) for rate in (0, 0.004))
    assert balanced(alone)[0] == balanced(moved)[0]
    assert late(moved) - 1 < 0.6 * (late(alone) - 1)


def test_a_loss_evens_a_router(tmp_path):
    how = dict(router="softmax", size=0.3, steps=60, lr=1e-2)
    alone = run(tmp_path / "alone", balance="aux_loss=0", **how)
    evened = run(tmp_path / "evened", balance="aux_loss=0.1, z_loss=0.01", **how)
    assert [len(balanced(folder)[0]) for folder in (alone, evened)] == [1, 3]
    assert late(evened) < 2.5 < late(alone)
    _, aux, z = balanced(evened)[0]
    assert late(evened, 1) < 1.2 < aux and late(evened, 2) < 2 < z


def test_goes_on_with_its_biases(tmp_path):
    how = dict(router="sigmoid", balance="bias_rate=0.01, aux_loss=0.01", schedule="constant")
    truth = run(tmp_path / "whole", steps=4, **how)
    run(tmp_path / "parts", steps=2, **how)
    parts = run(tmp_path / "parts", steps=4, **how)
    assert balanced(parts) == balanced(truth)
    saved = weights(parts)
    for path, value in weights(truth).items():
        assert torch.equal(saved[path], value), path
    *files, _ = export_run(parts, tmp_path / "weights")
    [exported] = [load_file(file) for file in files if file.suffix == ".safetensors"]
    biases = [path for path in exported if path.endswith("router.bias")]
    assert biases and all(torch.equal(exported[path], saved[f"model.{path}"]) for path in biases)
    assert all(exported[path].any() for path in biases)


def test_goes_on_balanced_otherwise(tmp_path, capsys):
    how = dict(router="sigmoid", schedule="constant")
    first = run(tmp_path / "run", balance="aux_loss=0.01", steps=2, **how)
    truth = balanced(run(tmp_path / "truth", balance="aux_loss=0.01", steps=4, **how))
    capsys.readouterr()
    run(first, balance="bias_rate=0.01, z_loss=0.02", steps=4, quiet=False, **how)
    told = capsys.readouterr().err
    for words in "aux_loss was 0.01, is 0", "bias_rate was 0, is 0.01", "z_loss was 0, is 0.02":
        assert told.count(f"experts of E: {words}\n") == 1, told
    assert balanced(first)[:2] == truth[:2]
    # aux_loss is told before its coefficient, and z_loss now too.
    assert [len(step) for step in balanced(first)] == [2, 2, 2, 2]
    assert weights(first)["model.stack.1.mixer.router.bias"].any()
    with pytest.raises(ValueError, match="`stack.1` top_k was 2, is 3"):
        run(first, balance="top_k=3", steps=4, **how)
