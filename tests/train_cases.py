"""Runs that many processes make together, case after case: `together`. In one process: `go`.

A case: {"model": name of one of MODELS, "settings"}; a folder gets a folder of a run for each.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import together as ranked
from torch.distributed.checkpoint import FileSystemReader

import mambadsl
from mambadsl.train.log import losses
from mambadsl.train.loop import Keeping
from mambadsl.train.run import train
from mambadsl.train.save import newest
from mambadsl.train.settings import Settings

HEAD = "vocab = 256  d_model = 32"
LAYERS = """
layer M = mamba2(head_dim=8, d_state=8, chunk=8)
layer A = attention(heads=4)
layer F = mlp(d_ff=64)
layer E = moe(experts=4, top_k=2, d_ff=32, aux_loss=0.02, z_loss=0.01)
layer X = moe(experts=4, top_k=2, d_ff=16, router=sigmoid, aux_loss=0.01, bias_rate=1e-4)
layer T = attention(heads=4, residual=aside, input=with_embedding)
layer P = linear(residual=aside)
layer B = mamba1(d_state=4, dt_rank=4, gives=scan)
layer G = gmu()
layer K = attention(heads=4, gives=kv)
layer C = attention(heads=4, takes=kv)
layer Q = attention(heads=4, residual=attend)
layer R = Q(residual=attend(begins=true))
layer H = mlp(d_ff=64, residual=attend)
shared S = [A X]
shared Z = T
"""
#: What is hard about a pipeline, and the usual.
MODELS = {
    name: f"model {name} {{ {HEAD}  {settings} }} {LAYERS} stack {{ {stack} }} {tail}"
    for name, settings, stack, tail in (
        ("tied", "tie_embeddings = true", "M F A F M F M F A F", ""),
        ("untied", "tie_embeddings = false", "M X A E M F", ""),
        ("uncounted", "tie_embeddings = true", "S M F S", "mtp(loss_weight=0) { M S }"),
        ("sharing", "tie_embeddings = true", "S M S M Z P M F Z P M F S", ""),
        ("ahead", "tie_embeddings = true", "M F A F M F", "mtp(depths=2, weights=shared) { A F }"),
        ("carrying", "tie_embeddings = false", "B F K F G F C F G C", ""),
        ("attending", "narrow = attend", "[R H Q H]*3", "mtp() { R H }"),
    )
}
#: An epsilon that rounding does not turn over: Adam divides what is next to nothing by itself.
COMMON = dict(length=32, batch=8, steps=3, lr=3e-3, eps=1e-3, parts="reference", seed=3)


def go(name: str, case: dict[str, Any], out: Path) -> None:
    text = Path(__file__).read_text()
    data = out / "data.txt"
    if not data.exists() and int(os.environ.get("RANK", 0)) == 0:
        data.parent.mkdir(parents=True, exist_ok=True)
        part = data.with_suffix(".part")
        part.write_text(text)
        part.rename(data)
    if dist.is_initialized():
        dist.barrier()
    torch.manual_seed(0)
    train(
        mambadsl.load(text=MODELS[case["model"]]), [data], out / name, Settings(**{**COMMON, **case["settings"]}),
        held_out=0.1, keeping=Keeping(save_every=0, held_out_every=0, quiet=True), planned={"device": "cpu"},
    )


def together(cases: dict[str, dict[str, Any]], out: Path, *, ranks: int) -> None:
    """All cases in one start of so many processes."""
    ranked(partial(_each, cases, out), out, ranks=ranks)


def _each(cases: dict[str, dict[str, Any]], out: Path) -> None:
    dist.init_process_group("gloo")
    for name, case in cases.items():
        go(name, case, out)
    dist.destroy_process_group()


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest save: everything in it, by key."""
    saved, _ = newest(run)
    entries = FileSystemReader(saved.folder).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(e.size, dtype=e.properties.dtype) for key, e in entries.items()}
    dcp.load(tensors, checkpoint_id=saved.folder, no_dist=True)
    return tensors


def told(run: Path) -> tuple[list[float], float]:
    """Losses by step, and the held-out loss."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    [held_out] = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    return list(losses(run).values()), held_out


def balanced(run: Path) -> list[list[float]]:
    """What the log has of experts, by step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("imbalance", "aux_loss", "z_loss") if name in line] for line in lines]
