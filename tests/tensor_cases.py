"""Runs that tensor ranks make together, case after case in one start: `together`; `alone` is the same in one process.

A case: {"model", "settings"}; a folder gets a folder of a run for each.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import together as ranked

import mambadsl
from mambadsl.data.corpus import open_corpus
from mambadsl.data.rows import Rows
from mambadsl.train.loop import Keeping, Run
from mambadsl.train.run import planning
from mambadsl.train.settings import Settings
from mambadsl.train.stop import Stop
from mambadsl.train.world import World, opened

HEAD = "d_model = 16  context = 32  init_std = 0.2"
LAYERS = """
layer M = mamba2(heads=4, head_dim=6, d_state=5, groups=4, bias=true, chunk=4)
layer Few = mamba2(heads=4, head_dim=6, d_state=5, groups=2, chunk=4)
layer Single = mamba2(heads=4, head_dim=6, d_state=5, gated_norm=before_gate, chunk=4)
layer Bare = mamba2(heads=4, head_dim=6, d_state=5, groups=2, gated_norm=none, chunk=4)
layer A = attention(heads=4, kv_heads=2, head_dim=6, rope=rope(theta=100), qk_norm=per_head, qkv_bias=true, o_bias=true)
layer One = attention(heads=4, kv_heads=1, head_dim=6, out_gate=per_head, sinks=true)
layer Wide = attention(heads=4, kv_heads=1, head_dim=6, qk_norm=full_width)
layer Pairs = Wide(heads=8, kv_heads=4, head_dim=4, differential=halves, qkv_bias=true, sinks=true, out_gate=per_head)
layer F = mlp(d_ff=20, bias=true)
layer Dropped = F(dropout=0.2)
layer G = mlp(d_ff=12, gated=true)
layer E = Routed(shared_d_ff=8, shared_gate=sigmoid, bias_rate=0.01)
layer Routed = moe(experts=4, top_k=2, d_ff=8, gated=true, router=sigmoid)
layer Narrow = moe(experts=4, top_k=2, d_ff=12, latent=6, aux_loss=0.1, z_loss=0.05)
layer Delta = gated_delta_net(heads=4, key_heads=2, key_dim=5, value_dim=6, chunk=4)
layer Kimi = kimi_delta(heads=4, key_dim=5, value_dim=6, decay_rank=4, gate_rank=3, chunk=4)
layer Ling = kimi_delta(heads=4, key_dim=5, value_dim=6, decay=bounded, decay_rank=full, gate_rank=full, chunk=4)
layer Latent = mla(heads=4, nope_dim=5, rope_dim=4, value_dim=6, kv_rank=7, rope=rope(theta=100), out_gate=per_head)
layer Turned = mla(heads=4, nope_dim=5, rope_dim=4, value_dim=6, kv_rank=7, q_rank=9)
layer Heads = mamba1(d_inner=24, heads=4, d_state=4, dt_rank=2, dt_bc_norm=learned, chunk=4)
layer Channelled = mamba1(d_inner=24, d_state=4, dt_rank=2, dt_bc_norm=learned, bias=true, chunk=4)
layer Turning = mamba3(heads=4, head_dim=6, d_state=8, groups=2, chunk=4)
layer Many = mamba3(heads=4, head_dim=6, d_state=8, groups=1, rank=2, gated_norm=before_gate, chunk=4)
layer Grouped = mamba3(heads=4, head_dim=6, d_state=8, groups=2, rank=2, chunk=4)
layer Exponential = mlstm(heads=4, key_dim=4, value_dim=6, chunk=4)
layer Unit = rg_lru(d_inner=12, blocks=4, chunk=4)
layer Conv = short_conv(d_conv=3, conv_bias=true, bias=true)
layer Mean = wkv4(d_inner=12, chunk=4)
layer Channels = channel_mix(d_ff=20)
layer Fixed = lightning(heads=4, head_dim=6, chunk=4)
layer Side = attention(heads=4, head_dim=4, input=with_embedding, residual=aside)
layer Proj = linear(norm=none, residual=aside)
layer Again = A(recompute=true)
layer Begins = A(residual=attend(begins=true))
layer Chooses = F(residual=attend)
shared S = [One(adapter=lora(rank=3, targets=[qkv_proj, o_proj], per=segment)) F]
shared Z = Side(adapter=lora(rank=2))
"""
STACKS = {
    "usual": "M A F Few G E",
    "linear": "Delta Kimi Ling Exponential Conv Fixed",
    "more": "Latent Turned Heads Turning Many Single Unit Pairs Wide",
    "older": "Mean Channelled Channels Narrow M+A Again Bare Grouped",
    "sharing": "S M S Z Proj F S",
    "dropped": "Dropped Again",
    "attending": "[Begins Chooses*2]*2",
    "ahead": "M A F",
}
#: Of a stack, what is around it: settings and a tail. No number of ranks divides 257.
AROUND = {
    "dropped": ("vocab = 257", ""),
    "older": ("vocab = 256  meta_tokens = 3", ""),
    "ahead": (
        "vocab = 256  embedding_multiplier = 1.5  embedding_norm = rmsnorm  logits_multiplier = 0.5  "
        "logits_softcap = 2.0",
        "mtp(depths=2, weights=shared) { A F }",
    ),
}
#: An epsilon that rounding does not turn over: Adam divides what is next to nothing by itself.
COMMON = dict(length=16, batch=8, steps=3, lr=1e-2, eps=1e-3, parts="reference", seed=3)


def text(model: str) -> str:
    """`usual tied`, `sharing untied`."""
    stack, _, end = model.rpartition(" ")
    tied = "true" if end == "tied" else "false"
    settings, tail = AROUND.get(stack, ("vocab = 256", ""))
    head = f"model small {{ {HEAD} {settings} tie_embeddings = {tied} }}"
    return f"{head} {LAYERS} stack {{ {STACKS.get(stack, stack)} }} {tail}"


def run_in(world: World, case: dict[str, Any], out: Path, name: str) -> Run:
    """The case's run, ready to train."""
    program = mambadsl.load(text=text(case["model"]))
    settings = Settings(**{**COMMON, **case["settings"]})
    plan = planning(program, settings, device="cpu") if settings.stages > 1 else None
    cache = out / f"data {os.environ.get('RANK', 'alone')}"
    corpus = open_corpus([Path(__file__)], vocab=program.spec.settings.vocab, cache=cache)
    rows = Rows(corpus, length=settings.length, held_out=0.01)
    keeping = Keeping(save_every=2, held_out_every=0, quiet=True)
    return Run(program.layers, rows, settings, out / name, world=world, plan=plan, keeping=keeping)


def together(cases: dict[str, dict[str, Any]], out: Path, *, ranks: int) -> None:
    """All cases in one start of so many processes."""
    ranked(partial(_each, cases, out), out, ranks=ranks)


def _each(cases: dict[str, dict[str, Any]], out: Path) -> None:
    dist.init_process_group("gloo")
    for name, case in cases.items():
        sizes = {key: case["settings"].get(key, 1) for key in ("stages", "tensor")}
        with Stop() as stop, opened(torch.device("cpu"), **sizes) as world:
            run_in(world, case, out, name).train(stop)
    dist.destroy_process_group()


def alone(case: dict[str, Any], out: Path, name: str, *, trains: bool = True) -> dict[str, torch.Tensor]:
    """The case's weights and moments in one process, by key; after its last step, or as they are in its last save."""
    settings = {key: v for key, v in case["settings"].items() if key not in ("stages", "tensor", "pipeline")}
    with opened(torch.device("cpu")) as world:
        run = run_in(world, {**case, "settings": settings}, out, name)
        if trains:
            with Stop() as stop:
                run.train(stop)
        return {key: tensor.clone() for key, tensor in run.saver.tensors().items()}
