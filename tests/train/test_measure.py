"""Measured layers: what the planner reads of them, and what a step of them takes and keeps."""

from __future__ import annotations

import json
import time
from statistics import median

import pytest
import torch
from ranks import together
from small_models import LAYERS
from train_faults import Typed

from mambadsl.compile import load
from mambadsl.data.rows import Batch
from mambadsl.plan.device import DEVICES, LayerTime, device, measured
from mambadsl.plan.from_graph import units
from mambadsl.train import measure as measuring
from mambadsl.train.clock import Clock
from mambadsl.train.engine import engine
from mambadsl.train.machine import Speeds
from mambadsl.train.measure import Measured, Measurement, measure
from mambadsl.train.memory import Counted
from mambadsl.train.run import expected
from mambadsl.train.settings import Settings
from mambadsl.train.tables import measurement_text
from mambadsl.train.world import opened

HEAD = "model t {{ vocab = {vocab}\n d_model = {width}\n context = 64 }}\n"


def program(stack, *, width=16, vocab=61, more=""):
    return load(text=HEAD.format(width=width, vocab=vocab) + LAYERS + more + f"stack {{ {stack} }}\n")


@pytest.fixture
def quick(monkeypatch):
    for name in ("WARM", "LEAST", "MOST"):
        monkeypatch.setattr(measuring, name, 1)


def test_the_planner_reads_what_is_written(quick, tmp_path):
    made = program("M A A F M L Z S Side M A S")
    found = measure(made.layers, length=8, sequences=2, parts="reference")
    path = tmp_path / "times.json"
    path.write_text(json.dumps(found.to_json()))
    where = device(path)
    assert where.microbatch_tokens == 16 and where.name == "CPU, measured"
    chain = measured(units(made.layers, device=where), where, microbatch_tokens=16)
    taken = {path: row.time for row in found.rows for path in row.paths}
    assert set(taken) == {unit.path for unit in chain}
    for unit in chain:
        one = taken[unit.path]
        assert (unit.forward_s, unit.backward_input_s, unit.backward_weight_s) == (
            one.forward_s, one.backward_input_s, one.backward_weight_s
        )
        assert unit.activation_bytes == one.activation_bytes and unit.working_bytes == one.working_bytes
    assert made.plan(stages=2, device=path, length=8, sequences=2).step_s > 0


def test_more_than_there_is_memory_for_is_refused(quick, monkeypatch):
    made = program("M")
    with pytest.raises(ValueError, match="2 x 999,999,999,999 tokens are more than are measured at once"):
        measure(made.layers, length=999_999_999_999, sequences=2)
    # With neither words nor type of a full memory it is a bug, and stays one.
    for words, raised in ("DefaultCPUAllocator: can't allocate memory", ValueError), ("size mismatch", RuntimeError):

        def fails(self, stage):
            raise RuntimeError(words)

        monkeypatch.setattr(measuring._Bench, "run", fails)
        with pytest.raises(raised, match="`embed` with 1 x 8 tokens does not fit" if raised is ValueError else words):
            measure(made.layers, length=8, parts="reference")


def test_equal_layers_are_measured_once_and_different_ones_are_told_apart(quick):
    told = []
    made = program("M A M L M A F", more="layer Wide = F(d_ff=40)\n")
    found = measure(made.layers, length=8, parts="reference", tell=told.append)
    assert [row.paths for row in found.rows] == [
        ("embed",), ("stack.0", "stack.2", "stack.4"), ("stack.1", "stack.5"), ("stack.3",), ("stack.6",), ("head",)
    ]
    assert len(told) == 6 and told[1] == "mamba2 (stack.0 and 2 more)"
    # The kind is the more frequent sort's name; the other has its path.
    assert [time.name for time in found.layers] == ["embed", "mamba2", "attention", "stack.3", "mlp", "head"]


def test_the_same_layer_is_another_where_the_stream_is_wider(quick):
    made = program("X Y Y X Y", more="layer X = F(residual=attend(begins=true)) layer Y = F(residual=attend)\n")
    found = measure(made.layers, length=8, parts="reference")
    assert [row.paths for row in found.rows[1:-1]] == [
        ("stack.0",), ("stack.1", "stack.2"), ("stack.3",), ("stack.4",)
    ]
    # No layer keeps the states of layers above it once more, only a few numbers of each.
    first, last = found.rows[2].time.activation_bytes, found.rows[4].time.activation_bytes
    assert 0 < last - first <= 8 * 4 * 8 < 8 * 16 * 4


def test_a_tail_is_measured_with_the_head(quick):
    text = HEAD.format(width=16, vocab=61) + LAYERS + "stack { M F }\nmtp(depths=2, weights=shared) { A F }\n"
    found = measure(load(text=text).layers, length=8, parts="reference")
    times = {row.paths: row.time for row in found.rows}
    assert times["head",].forward_s > 0
    tail = [t for paths, t in times.items() if paths[0].startswith("mtp.")]
    assert len(tail) > 4 and all(t.forward_s == t.backward_weight_s == t.activation_bytes == 0 for t in tail)


def test_a_tensor_rank_has_its_part_of_the_vocabulary(quick):
    made = program("M F", vocab=512)
    one, two = ({row.kind: row.time for row in measure(made.layers, length=32, parts="reference", tensor=n).rows}
                for n in (1, 2))
    logits = 32 * 512 * 4
    assert one["head"].activation_bytes >= logits > two["head"].activation_bytes >= logits // 2


def test_a_layer_keeps_what_is_known_of_it(quick):
    """An mlp with relu2 in float32: the normed stream, before and after the activation, what the norm and the square
    keep, and what it gives."""
    [row] = (r for r in measure(program("F").layers, length=32, parts="reference").rows if r.kind == "mlp")
    stream, inner = 32 * 16 * 4, 32 * 20 * 4
    assert 2 * stream + 2 * inner <= row.time.activation_bytes <= 4 * stream + 4 * inner
    [again] = (r for r in measure(program("F").layers, length=32, parts="reference", recompute=True).rows
               if r.kind == "mlp")
    # With recompute, only what it gives.
    assert stream <= again.time.activation_bytes < 1.2 * stream


def test_memory_is_counted_while_somebody_has_it():
    weight = torch.ones(64, 64)
    with Counted() as used:
        a = torch.zeros(1000)
        assert used.held == 4000
        b = a.view(10, 100) + 1
        turned = weight.t()
        assert used.held == 8000 and turned.shape == (64, 64)
        del a
        assert used.held == 4000
        del b
    assert used.held == 0 and used.most == 8000


def test_what_cannot_be_measured_is_refused(quick):
    with pytest.raises(ValueError, match="length must be at least 1"):
        measure(program("M").layers, length=0)
    with pytest.raises(ValueError, match="sequences must be at least 1"):
        measure(program("M").layers, sequences=0)


def test_a_step_takes_what_its_layers_take(monkeypatch, tmp_path):
    """In the process's own time: other processes are no part of it."""
    monkeypatch.setattr(Clock, "mark", lambda self: time.process_time())
    made = program("G F A G F A", width=96, vocab=256, more="")
    settings = Settings(length=64, batch=8, microbatch=4, parts="reference")
    path = tmp_path / "times.json"
    path.write_text(json.dumps(measure(made.layers, length=64, sequences=4, parts="reference").to_json()))
    will = expected(made, settings, ranks=1, device=str(path), fused=False)
    with opened(torch.device("cpu")) as world:
        runs = engine(made.layers, world, settings, None)
        tokens_BT = torch.randint(256, (8, 64))
        batch = Batch(tokens_BT, tokens_BT, torch.zeros(8, 64, dtype=torch.int32))
        taken = []
        for _ in range(6):
            begun = time.process_time()
            runs.forward_backward(batch, torch.tensor([512]))
            taken.append(time.process_time() - begun)
    assert median(taken) / 2 < will.layers_s < 2 * median(taken)


def test_two_processes_measure_what_is_between_them(tmp_path):
    model, path = tmp_path / "t.mdl", tmp_path / "times.json"
    model.write_text(HEAD.format(width=16, vocab=61) + "layer F = mlp(d_ff=32)\nstack { F F }\n")
    how = ("--device", "cpu", "--length", "8", "--stages", "2")
    done = together(Typed(("plan", str(model), "--measure", str(path), *how)), tmp_path, ranks=2)
    # The first process speaks, once.
    said = "".join(done.said)
    assert said.count("predicted for forwards and backwards") == said.count("link:") == 1
    where = device(path)
    assert where.beside_transfer >= 1 and 0 < where.link_latency_s < 1 and where.link_bytes_per_s > 1e6


def test_golden(golden):
    rows = [
        ("embed", ("embed",), (1e-4, 0.0, 3e-4, 2**20, 2**22), "none"),
        ("mamba2", ("stack.0", "stack.2"), (2e-3, 3e-3, 2e-3, 2**28, 2**26), "flops"),
        ("mlp", ("stack.1",), (1e-3, 1e-3, 1e-3, 2**27, 2**26), "measured"),
        ("head", ("head",), (5e-3, 5e-3, 5e-3, 2**28, 2**30), "measured"),
    ]
    made = tuple(Measured(kind, paths, LayerTime(paths[0], *numbers), split) for kind, paths, numbers, split in rows)
    speeds = Speeds(7.9e14, 4.3e12, DEVICES["h200"].memory_bytes, 2e-5, 3.6e11, 1e-5, 1.12)
    golden("measurement.txt", measurement_text(
        Measurement("h200", "NVIDIA H200", "bf16, parts fused", 4096, speeds, made)
    ))
