"""Balanced experts on a GPU: what the fused parts and compiled layers tell, and a run that balances them."""

from __future__ import annotations

import json

import pytest
import torch
from on_gpu import NEEDS_GPU

import mambadsl
from mambadsl.train.loop import Keeping
from mambadsl.train.run import train
from mambadsl.train.settings import Settings

pytestmark = NEEDS_GPU

TEXT = """
model experts { vocab = 256  d_model = 64  init_std = 0.2 }
layer A = attention(heads=4)
layer E = moe(experts=8, top_k=2, d_ff=64, gated=true, router=ROUTER, z_loss=0.001, BALANCE)
stack { A E A E }
"""
ROUTERS = {"softmax": "aux_loss=1", "sigmoid": "aux_loss=0.001, bias_rate=0.03"}
WAYS = {
    "reference": dict(parts="reference", dtype="bf16"), "fused": dict(parts="fused", dtype="bf16"),
    "compiled, accumulated, recomputed": dict(parts="fused", dtype="bf16", compile=True, microbatch=4, recompute=True),
}


def steps(folder, program, data, **how) -> list[dict[str, float]]:
    settings = Settings(length=256, batch=16, steps=12, lr=1e-3, seed=3, **how)
    train(program, [data], folder, settings, device="cuda", keeping=Keeping(saves=0, quiet=True))
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("router", ROUTERS)
def test_runs_tell_the_same_and_become_even(tmp_path, router):
    """The first step within what bfloat16 makes of scores that are nearly equal; later ones balanced."""
    program = mambadsl.load(text=TEXT.replace("ROUTER", router).replace("BALANCE", ROUTERS[router]))
    data = tmp_path / "data.txt"
    data.write_text("\n".join(f"{n} times {n + 7} is {n * (n + 7)}, and that is all." for n in range(4000)))
    runs = {way: steps(tmp_path / way, program, data, **how) for way, how in WAYS.items()}
    for way, found in runs.items():
        for name, near in ("loss", 0.01), ("aux_loss", 0.02), ("z_loss", 0.02), ("imbalance", 0.05):
            assert found[0][name] == pytest.approx(runs["reference"][0][name], rel=near), (way, name)
        assert found[-1]["imbalance"] < found[0]["imbalance"], way
        assert torch.tensor([step["grad_norm"] for step in found]).isfinite().all(), way
