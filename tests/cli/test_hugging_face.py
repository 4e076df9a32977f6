"""import, export and verify as commands: what they print, write and return."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mambadsl.cli.commands import cli

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "docs/tiny_qwen3_next/config.json"
SHIPPED = ROOT / "docs/tiny_qwen3_next/model.mdl"


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_the_shipped_file_is_what_import_gives():
    assert run("import", "hf", CONFIG).stdout == SHIPPED.read_text()


def test_import_writes_a_file_and_weights(tmp_path):
    import transformers

    config = transformers.AutoConfig.from_pretrained(CONFIG.parent)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    file, weights = tmp_path / "made" / "model.mdl", tmp_path / "weights"
    done = run("import", "hf", tmp_path / "theirs", "-o", file, "--weights", weights, "--name", "mine")
    assert done.exit_code == 0 and not done.stdout and "wrote" in done.stderr
    assert "model mine {" in file.read_text() and (weights / "weights.safetensors").is_file()

    same = run("verify", file, "--weights", weights, "--against", "hf", tmp_path / "theirs", "--json")
    said = json.loads(same.stdout)
    assert same.exit_code == 0 and said["ok"] and not said["random"] and said["first"] is None
    assert [row["at"] for row in said["rows"]] == [*(f"stack.{i}" for i in range(1, 16, 2)), "logits"]

    out = run("export", "hf", file, "--weights", weights, "-o", tmp_path / "again", "--json")
    assert json.loads(out.stdout)["unchanged"] and out.exit_code == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "theirs/model.safetensors").read_bytes()

    written = run("generate", file, "--weights", weights, "--tokens", "1,2,3", "--max-tokens", 3)
    assert written.exit_code == 0 and len(written.stdout.split()) == 3


def test_verify_says_where_it_differs(tmp_path):
    import torch

    import mambadsl
    from mambadsl.build.checkpoint import save_weights

    program = mambadsl.load(SHIPPED)
    save_weights(program.build(seed=1), tmp_path / "other")
    done = run("verify", SHIPPED, "--weights", tmp_path / "other", "--against", "hf", CONFIG.parent)
    assert done.exit_code == 1
    assert "the first that differs is stack.1 (model.layers.0)" in done.stdout
    assert "the same random ones" in done.stderr
    assert torch.is_grad_enabled()


def test_json_of_an_import():
    said = json.loads(run("import", "hf", CONFIG, "--json").stdout)
    assert said["ok"] and said["family"] == "qwen3_next" and said["text"] == SHIPPED.read_text()
    assert said["diagnostics"] == [] and said["files"] == [] and said["skipped"] == []


@pytest.mark.parametrize("args, says, code", [
    (("import", "hf"), "Missing argument", 2),
    (("import", "hff", "x"), "'hff' is not one of", 2),
    (("import", "hf", "nowhere"), "there is no file `nowhere`", 1),
    (("import", "hf", CONFIG, "--name", "Two Words"), "is no name for a model; `two_words` is", 2),
    (("import", "hf", CONFIG, "--weights", "ours"), "there are no tensors", 1),
    (("export", "hf", SHIPPED), "-o FOLDER says where", 2),
    (("export", "hf", SHIPPED, "-o", "out", "--family", "qwen"), "there is no family `qwen`", 1),
    (("export", "hf", SHIPPED, "-o", "out", "--family", "jamba"), "`gated_delta_net` as it is here", 1),
    (("export", "hf", SHIPPED, "-o", "out", "--weights", "nowhere"), "there is no folder `nowhere`", 1),
    (("verify", SHIPPED), "Missing option '--against'", 2),
    (("verify", SHIPPED, "--against", "hf", "nowhere"), "there is no file `nowhere`", 1),
    (("verify", SHIPPED, "--against", "hf", CONFIG, "--length", "99999"), "the model's context", 2),
    (("verify", ROOT / "models/tiny.mdl", "--against", "hf", CONFIG), "is not the model in", 1),
])
def test_wrong_use(args, says, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.exit_code == code
    assert says in done.stderr
    assert not any(tmp_path.iterdir())
