"""Every command: what it prints, what it refuses, and its exit code."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from show_models import SHARED

from mambadsl import load
from mambadsl.cli.commands import COMMANDS, cli
from mambadsl.files import MODELS

TINY, NEMOTRON = str(MODELS / "tiny.mdl"), str(MODELS / "nemotron_h_8b.mdl")
#: A command line for each command that takes a model, without the model.
ON_A_MODEL = ("check", "compile", "plan", "expand", "summary", "graph")
BAD = "M MM Q"


def call(*args: str, text: str | bytes | None = None, **more):
    result = CliRunner().invoke(cli, [str(a) for a in args], input=text, **more)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def data(*args: str, code: int = 0, **more) -> dict:
    result = call(*args, "--json", **more)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", ON_A_MODEL)
def test_a_file_text_and_standard_input_are_the_same(command):
    text = Path(TINY).read_text()
    results = [call(command, TINY), call(command, "-e", text), call(command, "-", text=text)]
    assert [r.exit_code for r in results] == [0, 0, 0]
    names = (TINY, "<text>", "<stdin>")
    assert len({r.stdout.replace(name, "FILE") for r, name in zip(results, names)}) == 1


@pytest.mark.parametrize("command", ON_A_MODEL)
@pytest.mark.parametrize("args", [("-e", BAD), ("nope.mdl",), (str(MODELS),), ("-e", "")])
def test_problems_are_exit_1_on_standard_error_or_in_json(command, args):
    result = call(command, *args)
    assert result.exit_code == 1
    assert "error[E0" in result.stderr and "error[E0" not in result.stdout
    found = data(command, *args, code=1)
    listed = found["files"][0]["diagnostics"] if command == "check" else found["diagnostics"]
    assert found["ok"] is False and all(d["severity"] == "error" and d["message"] for d in listed)


@pytest.mark.parametrize("command", [*ON_A_MODEL, "generate", "fmt"])
def test_both_or_neither_of_file_and_text_is_bad_usage(command):
    assert call(command).exit_code == 2
    result = call(command, TINY, "-e", "M A")
    assert result.exit_code == 2 and "not both" in result.stderr and not result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("check", TINY, "--tp", "0"),
        ("check", TINY, "--parts", "fusd"),
        ("compile", TINY, "--parts", "fusd"),
        ("check", TINY, "--target", "vlm"),
        ("check", TINY, "--format", "xml"),
        ("check", TINY, "--memory", "80 apples"),
        ("check", TINY, "--dtype", "fp8"),
        ("plan", TINY, "--stages", "x"),
        ("plan", TINY, "--device", "h20"),
        ("plan", TINY, "--schedule", "2f2b"),
        ("plan", TINY, "--memory", "0GiB"),
        ("plan", TINY, "--device", "h100", "--measured", "t.json"),
        ("plan", TINY, "--measured", "times.txt"),
        ("expand", TINY, "--all"),
        ("summary", TINY, "--length", "-1"),
        ("graph", TINY, "--as", "png"),
        ("graph", TINY, "--stages", "0"),
        ("fmt", TINY, "--check", "--stdout"),
        ("compile", TINY, "--stages", "0"),
        ("explain", "E998"),
        ("explain", "mamba9000"),
        ("explain",),
        ("completion", "tcsh"),
        ("generate", TINY, "--tokens", "1,b"),
        ("generate", TINY),
        ("generate", TINY, "--prompt", "a", "--tokens", "1"),
        ("generate", TINY, "--prompt", "a", "--top-p", "2"),
        ("summary", TINY, "--set", "d_model"),
        ("summary", TINY, "--set", "d_model=8", "--set", "d_model=16"),
        ("chek", TINY),
        (TINY,),
        ("--no-such-flag",),
    ],
)
def test_bad_usage_is_exit_2(args):
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert "Error:" in result.stderr and not result.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (("chek", TINY), "did you mean `check`"),
        ((TINY,), "mambadsl check"),
        (("plan", TINY, "--device", "h20"), "`h200`"),
        (("explain", "mamba"), "mamba2"),
        (("explain", "E20"), "codes such as E204"),
        (("check", TINY, "--target", "vlm"), "none of `none`, `hf`, `megatron`, `vllm`"),
        (("explain", "E998"), "there is no code E998"),
    ],
)
def test_bad_usage_says_what_was_meant(args, words):
    assert words in call(*args).stderr


def test_set_changes_the_model():
    assert data("summary", TINY, "--set", "d_model=64", "--set", "M.heads=4")["model"]["d_model"] == 64
    assert data("check", TINY, "--set", "d_modl=64", code=1)["files"][0]["diagnostics"][0]["code"] == "E048"


# ---- check


def test_check_says_how_large_a_model_is():
    assert call("check", NEMOTRON).stdout == f"{NEMOTRON}: 52 layers, 8.10 B params\n"


def test_check_of_several_files(tmp_path):
    bad = tmp_path / "bad.mdl"
    bad.write_text(BAD)
    found = data("check", NEMOTRON, MODELS / "std.mdl", bad, code=1)
    assert [f["ok"] for f in found["files"]] == [True, True, False]
    assert found["files"][0]["params"] == 8_100_852_736 and found["files"][1]["library"] == 5
    lines = call("check", NEMOTRON, MODELS / "std.mdl", bad).stdout.splitlines()
    assert lines[1].endswith("std.mdl: a library of 5 layers") and lines[2] == f"{bad}: 2 errors"


def test_a_library_with_a_mistake_is_not_fine(tmp_path):
    assert "E022" in call("check", "-e", "layer M = mamba2(hedas=2)").stderr
    assert "E029" in call("check", "-e", "model m { d_model = 64 }\nlayer M = mamba2()").stderr


def test_check_with_facts():
    assert call("check", NEMOTRON, "--tp", "8").exit_code == 0
    result = call("check", NEMOTRON, "--tp", "3")
    assert result.exit_code == 1 and "error[E201]" in result.stderr
    assert call("check", NEMOTRON, "--tp", "3", "--json").exit_code == 1


def test_check_for_github(tmp_path):
    file = tmp_path / "bad.mdl"
    file.write_text(BAD)
    result = call("check", file, "--format", "github")
    assert result.exit_code == 1 and result.stdout.startswith(f"::error file={file},line=1,col=3")
    assert not result.stderr


def test_colour_is_for_terminals(monkeypatch):
    assert "\033[" not in call("check", "-e", BAD).stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\033[" in call("check", "-e", BAD, color=True).stderr
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in call("check", "-e", BAD, color=True).stderr


@pytest.mark.parametrize("content, code", [(b"\xff\xfe", "E003"), (b"M \0", "E003"), (b"M " * 200_000, "E002")])
def test_what_is_no_text_is_a_diagnostic(content, code, tmp_path):
    file = tmp_path / "x.mdl"
    file.write_bytes(content)
    assert code in call("check", file).stderr
    assert code in call("check", "-", text=content).stderr


# ---- fmt

UGLY, NEAT = "M   M\tA # end\n\n\n", "M M A  # end\n"


def test_fmt_in_place_keeps_the_mode(tmp_path):
    file = tmp_path / "a.mdl"
    file.write_text(UGLY)
    file.chmod(0o640)
    assert call("fmt", "--check", file).exit_code == 1 and file.read_text() == UGLY
    assert call("fmt", file).stdout == f"{file}: formatted\n"
    assert file.read_text() == NEAT and stat.S_IMODE(file.stat().st_mode) == 0o640
    assert call("fmt", file).stdout == "" and call("fmt", "--check", file).exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.mdl"]


def test_fmt_through_a_link_changes_what_it_points_to(tmp_path):
    (tmp_path / "a.mdl").write_text(UGLY)
    link = tmp_path / "b.mdl"
    link.symlink_to("a.mdl")
    assert call("fmt", link).exit_code == 0
    assert link.is_symlink() and (tmp_path / "a.mdl").read_text() == NEAT


def test_fmt_prints(tmp_path):
    file = tmp_path / "a.mdl"
    file.write_text(UGLY)
    assert call("fmt", "--stdout", file).stdout == NEAT and file.read_text() == UGLY
    assert call("fmt", "-", text=UGLY).stdout == NEAT == call("fmt", "-e", UGLY).stdout
    assert data("fmt", "-e", UGLY)["files"] == [{"file": "<text>", "changed": True, "text": NEAT}]


def test_fmt_leaves_broken_files_alone_and_does_the_others(tmp_path):
    bad, good = tmp_path / "bad.mdl", tmp_path / "good.mdl"
    bad.write_text("M (")
    good.write_text(UGLY)
    result = call("fmt", bad, good)
    assert result.exit_code == 1 and "error[" in result.stderr
    assert bad.read_text() == "M (" and good.read_text() == NEAT


def test_fmt_turns_line_ends(tmp_path):
    file = tmp_path / "a.mdl"
    file.write_bytes(b"M A\r\n")
    assert call("fmt", "--check", file).exit_code == 1
    call("fmt", file)
    assert file.read_bytes() == b"M A\n"


# ---- the others


def test_expand_compiles_to_the_same_model():
    again = load(text=call("expand", TINY).stdout).layers
    assert again.content()["nodes"] == load(TINY).layers.content()["nodes"]
    assert "# default" in call("expand", TINY, "--origin").stdout


def test_plan_text_and_json():
    result = call("plan", NEMOTRON, "--stages", "4", "--memory", "100GiB")
    assert result.exit_code == 0 and "4 stages" in result.stdout
    plan = data("plan", NEMOTRON, "--stages", "4")["plan"]
    assert len(plan["stages"]) == 4 and sum(len(s["paths"]) for s in plan["stages"]) == 54


def test_plan_with_problems():
    result = call("plan", NEMOTRON, "--stages", "99")
    assert result.exit_code == 1 and "error[E802]" in result.stderr and not result.stdout


def test_plan_from_measured_times(tmp_path):
    times = {"forward_s": 1.0, "backward_input_s": 1.0, "backward_weight_s": 1.0}
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"base": "cpu", "microbatch_tokens": 256, "layers": {"mamba2": times}}))
    assert data("plan", TINY, "--measured", file)["plan"]["step_s"] > 6.0
    assert call("plan", TINY, "--measured", tmp_path / "nope.json").exit_code == 1


def test_summary_text_and_json():
    assert "total" in call("summary", "-e", SHARED).stdout
    assert len(data("summary", TINY, "--all")["rows"]) > len(data("summary", TINY)["rows"])


@pytest.mark.parametrize(
    "form, start",
    [
        ("text", "tiny\n|- embed"),
        ("dot", 'digraph "tiny" {'),
        ("mermaid", "flowchart TD"),
        ("svg", "<svg "),
        ("explorer", "{"),
    ],
)
def test_graph(form, start, tmp_path):
    printed = call("graph", TINY, "--as", form).stdout
    assert printed.startswith(start)
    file = tmp_path / "picture"
    assert call("graph", TINY, "--as", form, "-o", file).stdout == ""
    assert file.read_text() == printed
    assert data("graph", TINY, "--as", form)["text"] == printed
    assert "stage 1" in call("graph", TINY, "--stages", "2").stdout


def test_a_place_that_cannot_be_written(tmp_path):
    result = call("graph", TINY, "-o", tmp_path / "no" / "where.txt")
    assert result.exit_code == 1 and "cannot be written" in result.stderr
    (tmp_path / "file").write_text("")
    assert call("compile", TINY, "-o", tmp_path / "file" / "deep").exit_code == 1


def test_a_place_that_cannot_be_written_in_json(tmp_path):
    found = data("graph", TINY, "-o", tmp_path / "no" / "where.txt", code=1)
    assert found["ok"] is False and "cannot be written" in found["error"]


def test_a_picture_goes_to_a_device_too():
    assert call("graph", TINY, "-o", "/dev/null").exit_code == 0
    assert Path("/dev/null").exists() and not Path("/dev/null").is_file()


def test_a_picture_goes_to_standard_output_by_name_too():
    args = [sys.executable, "-m", "mambadsl", "graph", TINY, "-o", "/dev/stdout"]
    made = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and made.stdout == call("graph", TINY).stdout, made.stderr


def test_fmt_check_of_an_argument_asks_for_no_line_end():
    assert call("fmt", "--check", "-e", "M M A").exit_code == 0
    assert call("fmt", "--check", "-e", "M   M A").exit_code == 1


def test_numbers_of_a_large_model_are_readable():
    assert ": 3,000 layers" in call("check", "-e", "M*3000").stdout


def test_facts_about_a_default_are_told_without_a_place():
    assert "32,768 rows cannot be split over 3 devices" in call("check", "-e", "M", "--tp", "3").stderr


def test_compile_plans_as_it_is_told(tmp_path):
    told = ("--stages", "2", "--schedule", "zb", "--microbatches", "6", "--device", "h100", "--length", "128")
    call("compile", TINY, *told, "-o", tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan == data("plan", TINY, *told)["plan"]
    assert (plan["schedule"], plan["microbatches"], plan["device"]) == ("zb", 6, "h100")


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "plan.json").mkdir()
    result = call("compile", TINY, "-o", tmp_path)
    assert result.exit_code == 1 and f"`{tmp_path / 'plan.json'}` cannot be written" in result.stderr


def test_a_part_set_of_the_text_is_known(tmp_path):
    text = "stack { M A }\nparts mine : reference { }"
    assert call("compile", "-e", text, "--parts", "mine").exit_code == 0


def test_compile_writes_a_folder(tmp_path):
    found = data("compile", TINY, "--stages", "2", "-o", tmp_path / "out")
    assert sorted(Path(p).name for p in found["files"]) == ["graph.json", "plan.json", "summary.txt"]
    first = {p: Path(p).read_bytes() for p in found["files"]}
    call("compile", TINY, "--stages", "2", "-o", tmp_path / "out")
    assert {p: Path(p).read_bytes() for p in found["files"]} == first


def test_explain():
    assert call("explain", "e204").stdout.startswith("# E204")
    assert call("explain", "mamba2").stdout.startswith("mamba2: ")
    assert [row["name"] for row in data("explain", "sets")["rows"]][:2] == ["reference", "fused"]
    assert data("explain", "E204")["rows"] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    assert "_MAMBADSL_COMPLETE" in call("completion", shell).stdout


@pytest.mark.parametrize(
    "words, found",
    [
        ("mambadsl ", list(COMMANDS)),
        ("mambadsl su", ["summary"]),
        ("mambadsl plan --schedule z", ["zb", "zbv"]),
        ("mambadsl explain kin", ["kinds"]),
        ("mambadsl check --target v", ["vllm"]),
    ],
)
def test_completion_answers(words, found):
    count = len(words.split()) - (0 if words.endswith(" ") else 1)
    env = {"_MAMBADSL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    result = CliRunner().invoke(cli, [], env=env, prog_name="mambadsl")
    assert [line.split(",")[1] for line in result.stdout.split()] == found


def test_a_bug_is_said_to_be_one(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("what\nnow")

    monkeypatch.setattr("mambadsl.compile.compile_source", broken)
    result = call("summary", TINY)
    assert result.exit_code == 70
    assert "this is a bug: RuntimeError: what now" in result.stderr and "Traceback" not in result.stderr
    monkeypatch.setenv("MAMBADSL_DEBUG", "1")
    raised = CliRunner().invoke(cli, ["summary", TINY])
    assert isinstance(raised.exception, RuntimeError)


def test_ctrl_c(monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mambadsl.compile.compile_source", stopped)
    assert call("summary", TINY).exit_code == 130
