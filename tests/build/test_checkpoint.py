"""Saved anywhere, loaded anywhere; what does not fit is listed, and nothing is changed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import EVERYTHING, graph, made

from mambadsl.build.checkpoint import load_weights, save_weights
from mambadsl.build.model import build
from mambadsl.text.diagnostic import MdlError

TIED = dict(tie_embeddings="true")


def blank(stack: str, **options):
    return build(graph(stack, **options), seed=77)


def same(a, b) -> None:
    b = b.tensors()
    for path, tensor in a.tensors().items():
        assert torch.equal(tensor, b[path]) and tensor.dtype == b[path].dtype, path


def pieces(g, count: int):
    paths = [n.path for n in g.nodes]
    size = -(-len(paths) // count)
    return [paths[k : k + size] for k in range(0, len(paths), size)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_round_trip(tmp_path, dtype):
    model = made(EVERYTHING, dtype=dtype, **TIED)
    files = save_weights(model, tmp_path)
    assert [f.name for f in files] == ["weights.safetensors"]
    with safe_open(files[0], "pt") as opened:
        assert set(opened.keys()) == set(model.weights)
        assert opened.metadata()["model"] == "small"
    loaded = load_weights(build(graph(EVERYTHING, **TIED), dtype=dtype, seed=77), tmp_path)
    same(model, loaded)
    assert not list(tmp_path.glob("*.part"))


def test_large_models_are_sharded_with_an_index(tmp_path):
    model = made("M A F")
    files = save_weights(model, tmp_path, max_file_bytes=4000)
    assert len(files) > 2 and all(f.exists() for f in files)
    index = json.loads((tmp_path / "weights.index.json").read_text())
    assert set(index["weight_map"]) == set(model.weights)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.tensors().values())
    for path, name in index["weight_map"].items():
        assert path in load_file(tmp_path / name)
    same(model, load_weights(blank("M A F"), tmp_path))
    files[1].unlink()
    with pytest.raises(MdlError, match="lacks files"):
        load_weights(blank("M A F"), tmp_path)


@pytest.mark.parametrize("sizes", [(4000, 10**9), (10**9, 4000), (4000, 6000)])
def test_saving_again_leaves_nothing_of_the_last_time(tmp_path, sizes):
    save_weights(made("M A F", seed=1), tmp_path, max_file_bytes=sizes[0])
    model = made("M A F", seed=2)
    files = {f.name for f in save_weights(model, tmp_path, max_file_bytes=sizes[1])}
    assert {f.name for f in tmp_path.iterdir()} - {"weights.index.json"} == files
    assert (tmp_path / "weights.index.json").exists() == (len(files) > 1)
    same(model, load_weights(blank("M A F"), tmp_path))


def test_a_save_cut_short_is_not_loaded(tmp_path):
    """Old and new shards side by side, as a crash between two renames leaves them."""
    save_weights(made("M A F", seed=1), tmp_path / "new", max_file_bytes=4000)
    save_weights(made("M A F", seed=2), tmp_path / "old")
    first = sorted((tmp_path / "new").glob("*.safetensors"))[0]
    first.rename(tmp_path / "old" / first.name)
    with pytest.raises(MdlError, match="stored twice, unequal"):
        load_weights(blank("M A F"), tmp_path / "old")


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("loaded", [1, 3])
def test_any_split_reads_any_split(tmp_path, saved, loaded):
    stack = "S M B F S A B"
    model = made(stack, **TIED)
    g = model.graph
    for k in range(len(pieces(g, saved))):
        part = build(g, plan=pieces(g, saved), stage=k)
        part.load_state_dict({p: t for p, t in model.state_dict().items() if p in part.weights})
        save_weights(part, tmp_path)
    for k in range(len(pieces(g, loaded))):
        part = load_weights(build(g, plan=pieces(g, loaded), stage=k, device="meta"), tmp_path)
        assert set(part.tensors()) == set(part.weights)
        same(part, model)


def test_what_does_not_fit_is_listed_in_one_error(tmp_path):
    model = made("M A")
    save_weights(model, tmp_path)
    held = load_file(tmp_path / "weights.safetensors")
    held["stack.0.mixer.in_porj.weight"] = held.pop("stack.0.mixer.in_proj.weight")
    held["stack.1.norm.weight"] = torch.zeros(3)
    save_file(held, tmp_path / "weights.safetensors")
    target = blank("M A")
    before = {p: t.clone() for p, t in target.tensors().items()}
    with pytest.raises(MdlError) as caught:
        load_weights(target, tmp_path)
    problem, = caught.value.diagnostics
    assert problem.code.id == "E905"
    assert "1 missing, 1 unknown, 1 of another shape" in problem.message
    text = "\n".join(problem.notes)
    assert "missing: `stack.0.mixer.in_proj.weight`, nearest: `stack.0.mixer.in_porj.weight`" in text
    assert "unknown: `stack.0.mixer.in_porj.weight`" in text
    assert "[3] in the folder, [16] in the model" in text
    for path, tensor in target.tensors().items():
        assert torch.equal(tensor, before[path])


def test_one_name_with_two_values_is_refused(tmp_path):
    save_weights(made("M A", seed=1), tmp_path)
    g = graph("M A")
    for k, part in enumerate(pieces(g, 2)):
        save_weights(build(g, plan=pieces(g, 2), stage=k, seed=2), tmp_path)
    with pytest.raises(MdlError, match="stored twice, unequal"):
        load_weights(blank("M A"), tmp_path)


def test_folders_that_hold_nothing_or_damage(tmp_path):
    with pytest.raises(MdlError, match="there is no folder"):
        load_weights(blank("M"), tmp_path / "nowhere")
    with pytest.raises(MdlError, match="there are no weights"):
        load_weights(blank("M"), tmp_path)
    file, = save_weights(made("M"), tmp_path)
    with pytest.raises(MdlError, match="is a file; the folder"):
        load_weights(blank("M"), file)
    for text in "{", "[]", "{}", '{"weight_map": 3}':
        (tmp_path / "weights.index.json").write_text(text)
        with pytest.raises(MdlError, match="is no index of weights"):
            load_weights(blank("M"), tmp_path)
    (tmp_path / "weights.index.json").unlink()
    (tmp_path / "weights.safetensors").write_bytes(b"no such thing")
    with pytest.raises(MdlError, match="damaged"):
        load_weights(blank("M"), tmp_path)
