"""Saves: complete or not there, of any mesh for any other, and as safetensors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from train_faults import TEXT, Start, run, words

import mambadsl
from mambadsl.build.checkpoint import load_weights
from mambadsl.build.stage import stages
from mambadsl.graph.weights import all_weights
from mambadsl.train.export import export_run
from mambadsl.train.held import local
from mambadsl.train.optimizer import Optimizer
from mambadsl.train.pieces import piece
from mambadsl.train.save import Saved, Saver, complete, held, newest, prune, read, saves
from mambadsl.train.settings import Settings
from mambadsl.train.world import opened

MESHES = {"data": (2, {}), "stages": (2, {"stages": 2})}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name of a mesh -> the folder of a run of four steps; `alone`: one process."""
    base = tmp_path_factory.mktemp("runs")
    for name, (ranks, settings) in {"alone": (1, {}), **MESHES}.items():
        assert run(Start(base / name, {"steps": 4, "eps": 1e-3, **settings}), ranks=ranks).result["ended"] == "done"
    return {name: base / name for name in ("alone", *MESHES)}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_weights_of_any_mesh_are_the_models(runs, tmp_path, mesh):
    for name in ("alone", mesh):
        *_, text = export_run(runs[name], tmp_path / name)
        assert mambadsl.load(text).layers == mambadsl.load(text=TEXT).layers
    truth, found = (load_file(tmp_path / name / "weights.safetensors") for name in ("alone", mesh))
    assert found.keys() == truth.keys() == all_weights(mambadsl.load(text=TEXT).layers).keys()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)


def test_a_run_goes_on_on_another_mesh(runs, tmp_path):
    """Layers shared by two ranks, and then whole again."""
    shutil.copytree(runs["alone"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    how = dict(steps=4, eps=1e-3)
    start = Start(tmp_path / "run", how, {"save_every": 3}, data=(words(runs["alone"].parent),))
    assert run(replace(start, settings={**how, "tensor": 2}), ranks=2).result["step"] == 4
    assert losses(tmp_path / "run") == pytest.approx(losses(runs["alone"]), rel=1e-5)
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    assert run(start).result["step"] == 4
    assert losses(tmp_path / "run") == pytest.approx(losses(runs["alone"]), rel=1e-5)


def test_several_files(runs, tmp_path):
    files = export_run(runs["alone"], tmp_path / "many", step=2, max_file_bytes=8_000)
    assert len(files) > 3
    export_run(runs["alone"], tmp_path / "one", step=2)
    one, many = (
        load_weights(mambadsl.load(text=TEXT).build(seed=seed), tmp_path / name).tensors()
        for seed, name in enumerate(("one", "many"))
    )
    assert all(torch.equal(one[path], many[path]) for path in one)


def test_a_run_begins_with_weights_on_any_mesh(runs, tmp_path):
    export_run(runs["alone"], tmp_path / "weights")
    found = {}
    for name, (ranks, settings) in {"alone": (1, {}), **MESHES}.items():
        start = Start(tmp_path / name, {"steps": 2, "eps": 1e-3, **settings}, weights=tmp_path / "weights")
        assert run(start, ranks=ranks).result["ended"] == "done"
        found[name] = losses(start.folder)
    assert found["alone"][0] < losses(runs["alone"])[0] - 0.1
    for mesh in MESHES:
        assert found[mesh] == pytest.approx(found["alone"], rel=1e-5)


def test_weights_of_another_model(runs, tmp_path):
    export_run(runs["alone"], tmp_path / "weights")
    other = Start(tmp_path / "run", text=TEXT.replace("M F A F", "M F A"), weights=tmp_path / "weights")
    refused = run(other)
    assert refused.code == 70 and "E905" in refused.said[0] and "stack.3" in refused.said[0]
    assert not saves(tmp_path / "run") and not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_copy_of_a_weight_is_loaded(tmp_path, dtype):
    """Both ends of a V are on one rank, and a tied table in both of them; bf16: as DTensors."""
    graph = mambadsl.load(text=TEXT).layers
    first, *_, last = (node.path for node in graph.nodes)
    ends = [[first], [node.path for node in graph.layers], [last]]

    def saver(world, seed):
        settings = Settings(length=8, dtype=dtype, seed=seed)
        made = [piece(graph, stage, world, settings) for stage in stages(graph, ends)[::2]]
        return Saver(tmp_path, world, made, Optimizer(made, settings, fused=False), keep=1)

    with opened(torch.device("cpu")) as world:
        one, other = (saver(world, seed) for seed in (1, 2))
        one.start(1, {})
        assert one.finish() is None
        other.load(newest(tmp_path)[0])
        [(truth, *_), tables] = [[made.model.tensors()["embed.weight"] for made in s.pieces] for s in (one, other)]
        assert len(tables) == 2 and all(torch.equal(local(table), local(truth)) for table in tables)


def save(folder, *, step):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"step": step, "files": {}}))


def test_pruning_leaves_whole_saves_and_what_is_newer(tmp_path):
    for step in range(1, 7):
        save(tmp_path / f"step-{step:08d}", step=step)
    for broken in (2, 4, 6):
        (tmp_path / f"step-{broken:08d}" / "run.json").unlink()
    prune(tmp_path, 2)
    assert [folder.name for folder in saves(tmp_path)] == [f"step-{step:08d}" for step in (3, 4, 5, 6)]
    found, doubts = newest(tmp_path)
    assert found.step == 5 and len(doubts) == 1


def test_a_save_without_a_ranks_files_is_none(runs, tmp_path):
    """As when machines do not share the folder."""
    part = tmp_path / "step-00000009.part"
    shutil.copytree(newest(runs["data"])[0].folder, part)
    (part / "__1_0.distcp").unlink()
    with pytest.raises(OSError, match="__1_0.distcp not found: .* all machines"):
        complete(part, {"step": 9})
    assert isinstance(read(newest(runs["data"])[0].folder), Saved)


def test_a_folder_is_held_by_one(tmp_path):
    with held(tmp_path / "run"):
        with pytest.raises(ValueError, match="another process is training in"), held(tmp_path / "run"):
            pass
    with held(tmp_path / "run"):
        pass
