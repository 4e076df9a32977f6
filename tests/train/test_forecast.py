"""Forecasts against what ranks really hold: every rank's pieces are made in this process, among others that are not
there."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from mambadsl.compile import load
from mambadsl.data.rows import Batch
from mambadsl.plan.device import DEVICES
from mambadsl.text.diagnostic import MdlError
from mambadsl.train import measure as measuring
from mambadsl.train import pieces
from mambadsl.train.engine import engine
from mambadsl.train.forecast import chain, forecast
from mambadsl.train.memory import Counted
from mambadsl.train.optimizer import Optimizer
from mambadsl.train.run import expected, planning
from mambadsl.train.settings import Settings
from mambadsl.train.tables import forecast_text
from mambadsl.train.world import AXES, World

LENGTH = 32
HEAD = "model t { vocab = 96\n d_model = 32\n context = 64\n tie_embeddings = TIED }\n"
LAYERS = """
layer M = mamba2(heads=4, head_dim=16, d_state=8, groups=2, chunk=16)
layer A = attention(heads=4, kv_heads=2, head_dim=8, rope=rope(theta=100))
layer F = mlp(d_ff=128)
shared S = attention(heads=2, head_dim=16, input=with_embedding)
"""
MODELS = {
    "plain": (False, "M F A F M F A F"),
    "tied": (True, "M F A F M F"),
    "shared": (True, "M S F M S F"),
}
#: dtype, ranks, stages, microbatch.
LAYOUTS = [
    ("fp32", 1, 1, None), ("bf16", 1, 1, 2), ("fp32", 4, 1, 1), ("bf16", 4, 1, None), ("bf16", 3, 1, 1),
    ("fp32", 2, 2, 1), ("bf16", 4, 2, 1),
]


def model(name):
    tied, stack = MODELS[name]
    return load(text=HEAD.replace("TIED", str(tied).lower()) + LAYERS + f"stack {{ {stack} }}\n")


def settings(dtype="fp32", stages=1, microbatch=None, ranks=1, **more):
    # Twelve rows can be shared by one to four ranks.
    return Settings(
        length=LENGTH, batch=12, dtype=dtype, parts="reference", stages=stages, microbatch=microbatch, **more
    )


@pytest.fixture(autouse=True)
def no_values(monkeypatch):
    """Weights are there, but nothing is drawn for them: torch remembers of one rank which rows it has, for all."""
    monkeypatch.setattr(pieces, "put", lambda made, value: None)
    # Stages ask each other whether all know their shapes; those that are not there do not answer.
    monkeypatch.setattr(
        PipelineStage, "_warmup_backward_result", lambda self, received_result: torch.ones(()), raising=False
    )


@contextmanager
def world(rank, shape):
    size = shape[0] * shape[1] * shape[2]
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield World(init_device_mesh("cpu", shape, mesh_dim_names=AXES), torch.device("cpu"), None, None)
    finally:
        dist.destroy_process_group()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors):
    return sum(local(t).numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, ranks, stages, microbatch", LAYOUTS)
def test_weights_and_moments_are_those_of_the_pieces(name, dtype, ranks, stages, microbatch):
    program, how = model(name), settings(dtype, stages, microbatch)
    plan = planning(program, how, ranks=ranks) if stages > 1 else None
    will = expected(program, how, plan=plan, ranks=ranks)
    assert sorted(rank for held in will.held for rank in held.ranks) == list(range(ranks))
    for rank in range(ranks):
        with world(rank, (stages, ranks // stages, 1)) as here:
            parts = engine(program.layers, here, how, plan).pieces
            held = will.of(rank)
            assert size(t for made in parts for t in made.model.tensors().values()) == held.weights
            assert sum(local(p).numel() for made in parts for p in made.model.parameters()) == held.params
            assert size(t for *_, t in Optimizer(parts, how, fused=False).state()) == held.optimizer


@pytest.mark.parametrize("name, ranks, stages", [("plain", 2, 1), ("plain", 4, 1), ("tied", 4, 2)])
def test_tensor_ranks_hold_their_parts(name, ranks, stages):
    program, how = model(name), settings("bf16", stages, 1, tensor=2)
    plan = planning(program, how, ranks=ranks) if stages > 1 else None
    will = expected(program, how, plan=plan, ranks=ranks)
    for rank in range(ranks):
        with world(rank, (stages, ranks // stages // 2, 2)) as here:
            parts = engine(program.layers, here, how, plan).pieces
            assert size(t for made in parts for t in made.model.tensors().values()) == will.of(rank).weights
    alone = expected(program, settings("bf16", microbatch=1), ranks=1)
    assert will.held[0].params < alone.held[0].params


def test_tensor_ranks_share_and_send_the_ends():
    whole, shared = (
        {u.path: u for u in chain(model("plain").layers, settings(tensor=n), data=1, device=DEVICES["h200"])}
        for n in (1, 2)
    )
    table = 96 * 32
    assert [whole[end].params - shared[end].params for end in ("embed", "head")] == [table // 2] * 2
    assert shared["head"].activation_bytes < 0.7 * whole["head"].activation_bytes
    sent = DEVICES["h200"].link_latency_s
    assert shared["embed"].forward_s > whole["embed"].forward_s + sent / 2
    assert shared["embed"].backward_input_s == whole["embed"].backward_input_s
    assert shared["head"].forward_s <= whole["head"].forward_s
    assert shared["head"].backward_input_s > whole["head"].backward_input_s + sent / 2


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Times and sizes of a model's layers, measured as few times as will do."""
    made = {}

    def of(name, dtype, sequences, tensor=1):
        key = name, dtype, sequences, tensor
        if key not in made:
            path = tmp_path_factory.mktemp("measured") / "times.json"
            found = measuring.measure(
                model(name).layers, dtype=dtype, parts="reference", length=LENGTH, sequences=sequences, tensor=tensor
            )
            path.write_text(json.dumps(found.to_json()))
            made[key] = str(path)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "WARM", 1)
        patch.setattr(measuring, "LEAST", 1)
        patch.setattr(measuring, "MOST", 1)
        yield of


@pytest.mark.parametrize("name", ["plain", "tied"])
@pytest.mark.parametrize("dtype, ranks, stages, microbatch, tensor", [
    ("fp32", 1, 1, 12, 1), ("fp32", 1, 1, 3, 1), ("bf16", 1, 1, 12, 1), ("bf16", 1, 1, 3, 1), ("fp32", 2, 1, 3, 1),
    ("bf16", 2, 1, 3, 1), ("fp32", 2, 2, 3, 1), ("bf16", 2, 2, 3, 1), ("bf16", 4, 2, 3, 1), ("bf16", 4, 2, 3, 2),
])
def test_the_peak_is_that_of_all_tensors_of_a_step(device, name, dtype, ranks, stages, microbatch, tensor):
    program, how = model(name), settings(dtype, stages, microbatch, tensor=tensor)
    measured = device(name, dtype, microbatch, tensor)
    plan = planning(program, how, ranks=ranks, device=measured) if stages > 1 else None
    held = expected(program, how, ranks=ranks, plan=plan, device=measured).of(0)
    with world(0, (stages, ranks // stages // tensor, tensor)) as here:
        runs = engine(program.layers, here, how, plan)
        rows = how.batch * stages * tensor // ranks
        tokens_BT = torch.randint(96, (rows, LENGTH))
        batch = Batch(tokens_BT, tokens_BT, torch.zeros(rows, LENGTH, dtype=torch.int32))
        used = Counted()
        used.count(*(t for made in runs.pieces for t in made.model.tensors().values()))
        optimizer = Optimizer(runs.pieces, how, fused=False)
        used.count(*(t for *_, t in optimizer.state()))
        assert used.held == held.weights + held.optimizer
        with used:
            runs.forward_backward(batch, torch.tensor([tokens_BT.numel()]))
        gradients = size(p.grad for made in runs.pieces for p in made.model.parameters())
    assert held.peak == pytest.approx(used.most, rel=0.1)
    assert gradients == 4 * held.params <= held.gradients


def test_a_pipeline_of_more_microbatches_keeps_no_more_under_1f1b():
    program = model("plain")
    few, many = (
        expected(program, how, plan=planning(program, how, ranks=2), ranks=2)
        for how in (Settings(length=LENGTH, batch=n, stages=2, parts="reference") for n in (4, 16))
    )
    assert [h.activations for h in few.held] == [h.activations for h in many.held]
    assert all(b.buffers == 4 * a.buffers > 0 for a, b in zip(few.held, many.held))
    gpipe = Settings(length=LENGTH, batch=16, stages=2, parts="reference", pipeline="gpipe")
    all_of_them = expected(program, gpipe, plan=planning(program, gpipe, ranks=2), ranks=2)
    assert all_of_them.held[0].activations == 8 * many.held[0].activations


def test_a_step_is_its_parts_and_recompute_trades_memory_for_time():
    program = model("plain")
    will, again = (expected(program, settings(recompute=on), ranks=1) for on in (False, True))
    assert will.step_s == will.layers_s + will.copies_s + will.link_s + will.optimizer_s
    assert will.tokens_per_s == pytest.approx(12 * LENGTH / will.step_s)
    assert again.step_s > will.step_s and again.held[0].activations < will.held[0].activations


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_more_data_ranks_never_hold_more(ranks):
    one, more = (expected(model("plain"), settings("bf16", microbatch=1), ranks=n).held[0] for n in (1, ranks))
    assert all(getattr(more, what) <= getattr(one, what) for what in ("params", "weights", "copies", "optimizer"))


def test_ranks_rows_and_times_that_do_not_fit_are_refused(device):
    program = model("plain")
    with pytest.raises(ValueError, match="5 processes cannot be shared by 2 stages"):
        expected(program, settings(stages=2, microbatch=1), ranks=5)
    with pytest.raises(ValueError, match="12 rows cannot be shared by 5 data ranks"):
        expected(program, settings(), ranks=5)
    with pytest.raises(MdlError, match="measure again"):
        expected(program, settings(microbatch=4), ranks=1, device=device("plain", "fp32", 3))


def test_a_rank_that_does_not_fit_is_named():
    will = expected(model("plain"), settings(), ranks=1, memory_limit=2**19)
    [held] = will.too_large
    assert held.ranks == (0,) and "<- too large" in forecast_text(will, settings(), rows=30, corpus_tokens=900)


@pytest.mark.parametrize("name, dtype, ranks, stages, limit", [
    ("forecast_fsdp.txt", "bf16", 3, 1, None),
    ("forecast_pipeline.txt", "bf16", 4, 2, None),
    ("forecast_too_large.txt", "fp32", 1, 1, 2**19),
])
def test_golden(golden, name, dtype, ranks, stages, limit):
    program, how = model("tied"), settings(dtype, stages, 1)
    plan = planning(program, how, ranks=ranks) if stages > 1 else None
    will = forecast(program.layers, how, ranks=ranks, device=DEVICES["h200"], plan=plan, memory_limit=limit)
    golden(name, forecast_text(will, how, rows=30, corpus_tokens=900))
