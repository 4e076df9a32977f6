"""`mambadsl generate` with random weights: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mambadsl.cli.commands import cli
from mambadsl.files import MODELS

pytest.importorskip("torch")
TINY = str(MODELS / "tiny.mdl")


def call(*args: str):
    return CliRunner().invoke(cli, ["generate", TINY, *args])


def test_ids_stream_and_come_as_json():
    printed = call("--tokens", "1,2,3", "--max-tokens", "5")
    assert printed.exit_code == 0 and "random" in printed.stderr
    ids = [int(word) for word in printed.stdout.split()]
    assert len(ids) == 5
    found = json.loads(call("--tokens", "1,2,3", "--max-tokens", "5", "--json").stdout)
    assert found == {"ok": True, "tokens": ids, "text": None, "ended": "length", "weights": None}


def test_text_is_that_of_the_ids():
    found = json.loads(call("--prompt", "hi", "--max-tokens", "4", "--json").stdout)
    assert call("--prompt", "hi", "--max-tokens", "4").stdout == found["text"] + "\n"
    same = json.loads(call("--tokens", "104,105", "--max-tokens", "4", "--json").stdout)
    assert same["tokens"] == found["tokens"]


def test_the_seed_decides_and_a_stop_ends():
    draws = [call("--tokens", "1", "--max-tokens", "6", "--temperature", "1", "--seed", s).stdout for s in "112"]
    assert draws[0] == draws[1] != draws[2]
    first = call("--tokens", "1", "--max-tokens", "3").stdout.split()[0]
    stopped = json.loads(call("--tokens", "1", "--max-tokens", "3", "--stop", first, "--json").stdout)
    assert stopped["tokens"] == [] and stopped["ended"] == "stop"


def test_drafts_change_nothing(tmp_path):
    file = tmp_path / "ahead.mdl"
    file.write_text("model m { vocab = 256\n d_model = 32 }\nlayer F = mlp(d_ff=64)\nstack { F } mtp(depths=2) { F }\n")
    args = ["generate", str(file), "--tokens", "1,2", "--max-tokens", "6"]
    plain, drafted, many = (CliRunner().invoke(cli, [*args, "--drafts", n]) for n in "029")
    assert plain.exit_code == drafted.exit_code == 0 and plain.stdout == drafted.stdout
    assert many.exit_code == 2 and "from 0 to 2" in many.stderr
    assert "no `mtp` tail" in call("--tokens", "1", "--drafts", "1").stderr


def test_weights_of_a_checkpoint(tmp_path):
    from mambadsl import load
    from mambadsl.build.checkpoint import save_weights

    save_weights(load(TINY).build(seed=5), tmp_path)
    result = call("--tokens", "1,2", "--max-tokens", "4", "--weights", str(tmp_path))
    assert result.exit_code == 0 and not result.stderr
    assert result.stdout == call("--tokens", "1,2", "--max-tokens", "4", "--seed", "5").stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (("--tokens", "999"), "999"),
        (("--prompt", "a", "--device", "abacus"), "abacus"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--tokenizer", TINY), "is no tokenizer file"),
        (("--tokens", "1", "--tokenizer", "t.json"), "--tokenizer is for --prompt"),
        (("--prompt", "a", "--tokenizer", "nope.json"), "nope.json"),
        (("--tokens", "1", "--stop", "x"), "for --stop: `x` is not a list of token ids"),
    ],
)
def test_refusals_are_bad_usage(args, words):
    result = call(*args)
    assert result.exit_code == 2 and words in result.stderr, result.output


def test_a_bad_request_is_refused_before_anything_is_built():
    assert "random" not in call("--tokens", "999").stderr


def test_a_model_beyond_the_memory_is_refused():
    large = str(MODELS / "jamba_1_5_large.mdl")
    refused = CliRunner().invoke(cli, ["generate", large, "--tokens", "1", "--set", "vocab=100_000_000"])
    assert refused.exit_code == 1 and "the weights take 7.41 TiB" in refused.stderr


def test_what_changes_nothing_is_said():
    printed = call("--tokens", "1", "--max-tokens", "2", "--top-k", "3")
    assert printed.exit_code == 0 and "nothing is drawn" in printed.stderr
    assert "nothing is drawn" not in call("--tokens", "1", "--max-tokens", "2", "--temperature", "1").stderr


def test_a_folder_without_a_checkpoint(tmp_path):
    result = call("--tokens", "1", "--weights", str(tmp_path))
    assert result.exit_code == 1 and "error[E9" in result.stderr


def test_part_sets():
    """A set that this machine cannot have is refused with the reasons, and none replaces another in silence."""
    ids = ("--tokens", "1,2,3", "--max-tokens", "3")
    assert call(*ids, "--parts", "reference").stdout == call(*ids).stdout
    refused = call(*ids, "--parts", "te")
    assert refused.exit_code == 1 and "error[E902]" in refused.stderr and "te not installed" in refused.stderr
    unknown = call(*ids, "--parts", "fusd")
    assert unknown.exit_code == 2 and "did you mean `fused`?" in unknown.stderr
