"""Meshes of two GPUs train as one does: NCCL, FSDP2, pipelines and tensor ranks with the fused parts, in bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from on_gpu import NEEDS_GPU

pytestmark = [*NEEDS_GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

#: With norms that need the heads of both ranks, and a vocabulary and heads that they share.
TEXT = """
model ranks { vocab = 512  d_model = 512  context = 512 }
layer M = mamba2(heads=16, head_dim=64, d_state=64)
layer A = attention(heads=8, kv_heads=2, head_dim=64, qk_norm=full_width)
layer F = mlp(d_ff=2048, gated=true)
layer E = moe(experts=4, top_k=2, d_ff=512, aux_loss=0.01)
stack { [M F]*2 A E M F }
"""
MESHES = {
    "data": [], "layer by layer": ["--gather", "layers"], "1f1b": ["--stages", "2"], "tensor": ["--tensor", "2"],
    "zb": ["--stages", "2", "--pipeline", "zb"],
}


def losses(folder: Path, ranks: int, *options: str) -> list[float]:
    run = folder / "-".join([str(ranks), *options]).replace("--", "")
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    train = ["-m", "mambadsl", "train", folder / "model.mdl", "--data", folder / "tokens.npy", "-o", run]
    sizes = ["--length", "512", "--batch", "16", "--microbatch", "4", "--steps", "6", "--keep", "0", "--seed", "1"]
    how = ["--device", "cuda", "--dtype", "bf16", "--parts", "fused"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    command = [*launch, str(ranks), *train, *sizes, *how, *options]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "model.mdl").write_text(TEXT)
    np.save(folder / "tokens.npy", np.random.default_rng(0).zipf(1.5, 400_000).clip(0, 255))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return losses(folder, 1)


@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
@pytest.mark.parametrize("mesh", MESHES)
def test_two_gpus_train_as_one(folder, alone, mesh, compiled):
    """Within what rounding makes of six steps at a high rate; the first has only its own."""
    found = losses(folder, 2, *MESHES[mesh], *compiled)
    assert found[0] == pytest.approx(alone[0], rel=1e-3)
    assert found == pytest.approx(alone, rel=1e-2)
