"""Predicted and measured, at the end of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from mambadsl.compile import load
from mambadsl.data.rows import Batch
from mambadsl.files import MODELS
from mambadsl.plan.device import DEVICES
from mambadsl.plan.from_graph import units
from mambadsl.train.compare import Action, Comparison, Row
from mambadsl.train.engine import engine
from mambadsl.train.loop import Keeping
from mambadsl.train.run import planning, train
from mambadsl.train.save import COMPARED
from mambadsl.train.settings import Settings
from mambadsl.train.tables import compared_text
from mambadsl.train.watch import BEFORE, REDUCE, WATCHED, Watch
from mambadsl.train.world import AXES, World

TINY = MODELS / "tiny.mdl"


def test_a_run_ends_with_what_was_predicted(tmp_path, capsys):
    data = tmp_path / "text.txt"
    data.write_text("what was predicted, and what was measured\n" * 40)
    settings = Settings(length=32, batch=4, steps=3, parts="reference")
    program = load(TINY)
    done = train(program, [data], tmp_path / "run", settings, keeping=Keeping(0, 1))
    written = json.loads((tmp_path / "run" / COMPARED).read_text())
    assert written == done.compared.to_json() == done.to_json()["compared"]
    rows = {row["what"]: row for row in written["rows"]}
    assert rows["step"]["measured"] == done.step_s and rows["peak memory"]["measured"] is None
    # Nobody measured this machine: no times are predicted, and what to do about it is told.
    assert rows["step"]["predicted"] is None and rows["step"]["off"] is None
    assert rows["peak memory"]["predicted"] > 0 and written["nominal"] and not written["actions"]
    assert "plan --measure" in capsys.readouterr().err


def test_a_measured_device_predicts_times(tmp_path, capsys):
    data, device = tmp_path / "text.txt", tmp_path / "times.json"
    data.write_text("what was predicted, and what was measured\n" * 80)
    zero = {"forward_s": 1e-3, "backward_input_s": 1e-3, "backward_weight_s": 1e-3}
    program = load(TINY)
    kinds = {unit.kind for unit in units(program.layers, device=DEVICES["cpu"])}
    device.write_text(json.dumps({"base": "cpu", "microbatch_tokens": 128, "layers": dict.fromkeys(kinds, zero)}))
    settings = Settings(length=32, batch=4, steps=5, parts="reference")
    done = train(program, [data], tmp_path / "run", settings, keeping=Keeping(0, 1), planned={"device": str(device)})
    rows = {row.what: row for row in done.compared.rows}
    assert rows["step"].off == pytest.approx(done.step_s / rows["step"].predicted - 1)
    parts = [rows[what] for what in ("forwards, backwards", "norm, optimizer")]
    assert sum(row.predicted for row in parts) == pytest.approx(rows["step"].predicted)
    assert 0 < parts[0].measured and "plan --measure" not in capsys.readouterr().err


def test_a_few_steps_of_a_pipeline_are_watched(monkeypatch):
    monkeypatch.setattr(
        PipelineStage, "_warmup_backward_result", lambda self, received_result: torch.ones(()), raising=False
    )
    program, settings = load(TINY), Settings(length=16, batch=4, stages=2, parts="reference")
    plan = planning(program, settings, ranks=2)
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        world = World(init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=AXES), torch.device("cpu"), None, None)
        runs = engine(program.layers, world, settings, plan)
        watch = Watch(runs, world)
        assert watch.bubble() is None and watch.layers_s() is None and watch.actions() == {}
        tokens_BT = torch.randint(256, (4, 16))
        batch = Batch(tokens_BT, tokens_BT, torch.zeros(4, 16, dtype=torch.int32))
        for _ in range(BEFORE + WATCHED + 2):
            runs.forward_backward(batch, torch.tensor([64]))
    finally:
        dist.destroy_process_group()
    work, whole = watch.bubble()
    assert 0 < work < whole
    # Besides the actions, gradients are reduced.
    assert len(watch.spans) == WATCHED and len(watch.work) == WATCHED * (len(plan.orders()[1]) + 1)
    times = watch.actions()
    assert set(times) == {(1, "F"), (1, "B"), (1, REDUCE)}
    each = {"F": 4, "B": 4, REDUCE: 1}
    assert sum(each[kind] * takes for (_, kind), (takes, _) in times.items()) == pytest.approx(work / WATCHED)
    assert sum(each[kind] * sum(both) for (_, kind), both in times.items()) <= watch.layers_s() * (1 + 1e-9)
    assert "forward_backward" not in vars(runs) and "forward_one_chunk" not in vars(runs.schedule._stages[0])


def test_golden(golden):
    rows = (
        Row("step", "s", 0.412, 0.43), Row("tokens a second", "tokens/s", 318_000, 305_000),
        Row("bubble", "share", 0.09, 0.112), Row("peak memory", "bytes", 40 * 2**30, 41 * 2**30, (0, 1)),
        Row("peak memory", "bytes", 30 * 2**30, None, (2, 3)),
    )
    actions = (
        Action(0, "F", (0.0251, 0.0), (0.0257, 0.0002)), Action(0, "B", (0.0502, 0.0031), (0.0511, 0.0064)),
        Action(0, REDUCE, None, (0.002, 0.0)),
    )
    told = compared_text(Comparison("h200", False, rows, actions))
    nominal = tuple(replace(row, predicted=None) if row.unit in ("s", "tokens/s") else row for row in rows)
    nobody = tuple(replace(action, predicted=None) for action in actions)
    golden("compared.txt", told + "\n\n" + compared_text(Comparison("cpu", True, nominal, nobody)) + "\n")
