"""`train --dry-run` and `plan --measure`: what they print, what they write, what they refuse."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mambadsl.cli.commands import cli
from mambadsl.files import MODELS
from mambadsl.train import measure as measuring

TINY = str(MODELS / "tiny.mdl")


def call(*args: str):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def data(*args: str, code: int = 0) -> dict:
    result = call(*args, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a dry run trains nothing\n" * 100)
    return str(path)


def dry(text, tmp_path, *args):
    return ("train", TINY, "--data", text, "-o", str(tmp_path / "run"), "--length", "32", "--dry-run", *args)


@pytest.mark.parametrize("args", [(), ("--ranks", "4"), ("--ranks", "4", "--stages", "2", "--microbatch", "1"),
                                  ("--ranks", "2", "--stages", "2", "--pipeline", "zbv", "--plan-device", "h200")])
def test_a_dry_run_says_what_ranks_hold(text, tmp_path, args):
    found = data(*dry(text, tmp_path, *args))
    ranks = int(args[1]) if args else 1
    assert sorted(r for held in found["forecast"]["held"] for r in held["ranks"]) == list(range(ranks))
    assert found["forecast"]["mesh"][0] == (2 if "--stages" in args else 1)
    assert found["epochs"] == pytest.approx(1000 * 8 / found["rows"]) and found["corpus_tokens"] == 2500
    words = call(*dry(text, tmp_path, *args)).stdout
    assert words.startswith("ranks") and "activations" in words
    assert not (tmp_path / "run" / "log.jsonl").exists()
    words = call(*dry(text, tmp_path, *args, "--held-out", "0.1")).stdout
    assert "epochs of 2.50 K tokens in 79 rows, 8 of them held out" in words


def test_a_rank_that_does_not_fit_is_exit_1(text, tmp_path):
    result = call(*dry(text, tmp_path, "--memory", "1MiB"))
    assert result.exit_code == 1 and "rank 0 needs" in result.stdout
    found = data(*dry(text, tmp_path, "--memory", "1MiB"), code=1)
    assert found["ok"] is False and found["forecast"]["held"][0]["peak"] > found["forecast"]["memory_limit"]
    pipeline = call(*dry(text, tmp_path, "--memory", "1MiB", "--stages", "2", "--ranks", "2"))
    assert pipeline.exit_code == 1 and "error[E803]" in pipeline.stderr


@pytest.mark.parametrize("args, words", [
    (("--ranks", "3", "--stages", "2"), "3 processes cannot be shared by 2 stages"),
    (("--ranks", "3"), "8 rows cannot be shared by 3 data ranks"),
    (("--plan-device", "h20"), "h200"),
])
def test_what_cannot_be_run_cannot_be_forecast(text, tmp_path, args, words):
    result = call(*dry(text, tmp_path, *args))
    assert result.exit_code in (1, 2) and words in result.stderr


def test_ranks_are_of_a_dry_run(text):
    result = call("train", TINY, "--data", text, "--ranks", "2")
    assert result.exit_code == 2 and "--dry-run" in result.stderr


def test_measured_times_are_written_and_planned_with(tmp_path, text, monkeypatch):
    for name in ("WARM", "LEAST", "MOST"):
        monkeypatch.setattr(measuring, name, 1)
    path = tmp_path / "new" / "times.json"
    args = ("plan", TINY, "--measure", str(path), "--device", "cpu", "--length", "32", "--batch", "2", "--parts",
            "reference")
    result = call(*args, "--stages", "2")
    assert result.exit_code == 0 and "split by" in result.stdout and "2 stages, cut by the planner" in result.stdout
    assert "mamba2 (stack.0 and 1 more)" in result.stderr
    assert json.loads(path.read_text())["microbatch_tokens"] == 64
    assert data(*args)["measured"]["base"] == "cpu"
    again = data("plan", TINY, "--measured", str(path), "--length", "32", "--batch", "2")
    assert again["plan"]["device"] == "CPU, measured"
    will = data(*dry(text, tmp_path, "--plan-device", str(path), "--microbatch", "2"))
    assert will["forecast"]["measured"] is True
    # The run's parts are `auto`.
    otherwise = "fp32, parts reference; here fp32, parts auto"
    assert f"the times of `CPU, measured` are of layers that ran otherwise: {otherwise}" in will["notes"]
    other = call(*dry(text, tmp_path, "--plan-device", str(path)))
    assert other.exit_code == 1 and "measure again" in other.stderr


def test_what_no_measure_makes_right_is_said_first(tmp_path):
    (tmp_path / "file").touch()
    refused = (tmp_path / "file" / "t.json", 2, "cannot be written"), (tmp_path / "t.json", 99, "error[E802]")
    for path, stages, words in refused:
        result = call("plan", TINY, "--measure", path, "--device", "cpu", "--stages", stages)
        assert result.exit_code == 1 and words in result.stderr and "stack.0" not in result.stderr


@pytest.mark.parametrize("args, words", [
    (("--measure", "times.txt"), "not a .json file"),
    (("--measure", "t.json", "--device", "h100"), "--device cpu or cuda"),
    (("--measure", "t.json", "--measured", "t.json"), "one of the two"),
    (("--device", "cuda"), "--measure"),
    (("--compile",), "--compile is of --measure"),
    (("--dtype", "bf16"), "--dtype is of --measure"),
])
def test_bad_measuring_is_bad_usage(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    result = call("plan", TINY, *args)
    assert result.exit_code == 2 and words in result.stderr and not list(tmp_path.iterdir())
