"""Weights that the stages of a pipeline saved, out as a folder of Hugging Face's."""

from __future__ import annotations

import hf_tiny
import pytest
import torch

from mambadsl.build.checkpoint import load_weights, save_weights
from mambadsl.build.model import build
from mambadsl.hf.folder import export_hf, import_hf
from mambadsl.text.diagnostic import MdlError

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402


def by_stages(name, folder, **how):
    """A model with a tied table, saved by two stages that both have it."""
    found = import_hf(hf_tiny.saved(name, folder / "theirs"), weights=folder / "ours")
    graph = found.program.layers
    paths = [node.path for node in graph.nodes]
    for k in range(2):
        part = build(graph, plan=[paths[:3], paths[3:]], stage=k)
        save_weights(load_weights(part, folder / "ours"), folder / "stages", **how)
    return found.program


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("how", [{}, {"max_file_bytes": 8000}])
@pytest.mark.parametrize("name", ["mamba", "zamba2"])
def test_stages_are_the_whole(name, how, tmp_path):
    program = by_stages(name, tmp_path, **how)
    assert len(list((tmp_path / "stages").glob("*.safetensors"))) > (2 if how else 1)
    export_hf(program, tmp_path / "again", weights=tmp_path / "stages", family=name)
    found, wanted = tensors(tmp_path / "again"), tensors(tmp_path / "theirs")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def refused(program, folder):
    with pytest.raises(MdlError) as caught:
        export_hf(program, folder / "again", weights=folder / "stages", family="mamba")
    assert not (folder / "again").exists()
    return str(caught.value)


def test_copies_that_differ(tmp_path):
    program = by_stages("mamba", tmp_path)
    file = tmp_path / "stages/weights-stage-2-of-2.safetensors"
    weights = load_file(file)
    weights["embed.weight"][0, 0] += 1
    save_file(weights, file)
    text = refused(program, tmp_path)
    assert "`embed.weight` differs between `weights-stage-1-of-2.safetensors` and `weights-stage-2-of-2" in text
    save_file({**weights, "embed.weight": weights["embed.weight"].bfloat16()}, file)
    assert "`embed.weight` differs" in refused(program, tmp_path)


def test_a_stage_that_is_not_there(tmp_path):
    program = by_stages("mamba", tmp_path, max_file_bytes=8000)
    files = sorted((tmp_path / "stages").glob("weights-stage-2-*.safetensors"))
    files[0].unlink()
    assert "lacks files that `weights-stage-2-of-2.index.json` names" in refused(program, tmp_path)
    for file in (tmp_path / "stages").glob("weights-stage-2-*"):
        file.unlink()
    assert "do not fit the model" in refused(program, tmp_path)
