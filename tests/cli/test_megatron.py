"""`mambadsl import megatron` and `export megatron`: what is read, where it goes, and what is bad usage."""

from __future__ import annotations

import json

from click.testing import CliRunner

from mambadsl.build.checkpoint import save_weights
from mambadsl.cli.commands import cli
from mambadsl.compile import load

SCRIPT = "docs/megatron_args.sh"


def call(*args, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def test_a_pattern_a_script_and_both_say_the_same():
    alone = call("import", "megatron", SCRIPT, "--name", "small")
    both = call("import", "megatron", "M-M-M*-", "--args", SCRIPT, "--name", "small")
    assert alone.stdout == both.stdout and "[M F]*2 M A F" in alone.stdout
    assert not alone.stderr.strip()
    assert "E621" in call("import", "megatron", "M-M-M*", "--args", SCRIPT, code=1).stderr


def test_a_pattern_that_starts_with_a_dash():
    assert "F M" in call("import", "megatron", "--", "-M").stdout


def test_there_and_back(tmp_path):
    """A model, its checkpoint for two ranks, and the model again."""
    text = "model small { vocab = 64 d_model = 32 }\nlayer M = mamba2(heads=4, head_dim=16, groups=2)\nstack { M | M }"
    file = tmp_path / "small.mdl"
    file.write_text(text)
    save_weights(load(file).build(dtype="bf16"), tmp_path / "ours")
    command = ("export", "megatron", file, "--weights", tmp_path / "ours", "--tp", 2)
    assert call(*command, code=2).exit_code == 2
    data = json.loads(call(*command, "-o", tmp_path / "theirs", "--json").stdout)
    assert "--hybrid-layer-pattern 'M|M'" in data["text"] and len(data["files"]) == 6
    data = json.loads(call("import", "megatron", tmp_path / "theirs", "--weights", tmp_path / "back", "--json").stdout)
    assert data["name"] == "theirs" and data["pattern"] == "M|M" and "M | M" in data["text"]
    assert (tmp_path / "back/weights.safetensors").read_bytes()


def test_arguments_to_a_file(tmp_path):
    file = tmp_path / "new/args.txt"
    done = call("export", "megatron", "models/nemotron_h_8b.mdl", "-o", file)
    assert not done.stdout and f"wrote {file}" in done.stderr
    again = call("import", "megatron", file)
    assert "expect params == 8100852736" in again.stdout and not again.stderr.strip()
    assert call("export", "megatron", "models/nemotron_h_8b.mdl").stdout == file.read_text()


def test_options_of_the_other_form(tmp_path):
    for args in (
        ("import", "hf", "docs/tiny_qwen3_next", "--args", SCRIPT), ("export", "hf", "models/bamba_9b.mdl"),
        ("export", "hf", "models/bamba_9b.mdl", "-o", tmp_path, "--tp", 2),
        ("export", "megatron", "models/bamba_9b.mdl", "--family", "bamba"),
        ("import", "megatron", "M", "--args", "nowhere.sh"),
    ):
        assert call(*args, code=2).stderr


def test_weights_need_a_checkpoint(tmp_path):
    done = call("import", "megatron", SCRIPT, "--weights", tmp_path, code=1)
    assert "weights come from a checkpoint" in done.stderr
