"""`explain` of models, parts and packages, and the same table from `plan` and `compile`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from parts_fakes import BARE, GPU, gpu_with

from mambadsl import load
from mambadsl.cli.commands import cli
from mambadsl.files import MODELS
from mambadsl.parts import registry
from mambadsl.parts.machine import Machine
from mambadsl.plan.assign import assign
from mambadsl.run.doctor import environment
from mambadsl.show.parts import WIDTH, topics
from mambadsl.show.reference import page

TINY, NEMOTRON = str(MODELS / "tiny.mdl"), str(MODELS / "nemotron_h_8b.mdl")
DOCS = Path(__file__).parent.parent.parent / "docs" / "parts.md"


def call(*args: str, **more):
    result = CliRunner().invoke(cli, list(args), **more)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def on(monkeypatch):
    """on(machine): what `this_machine` finds."""

    def use(machine: Machine) -> None:
        monkeypatch.setattr(environment, "this_machine", lambda: machine)

    return use


def test_every_layer_of_the_text_has_its_slots(on):
    on(gpu_with("torch", "triton"))
    result = call("explain", NEMOTRON, "--parts", "fused")
    assert result.exit_code == 0
    assert re.search(r"^M = mamba2, 24 uses \(stack.0, ...\)$", result.stdout, re.MULTILINE)
    assert re.search(r"^  core +triton.core +first choice of `fused`$", result.stdout, re.MULTILINE)
    assert "this machine, a GPU" in result.stdout and "Missing here" not in result.stdout
    in_use = result.stdout.partition("Packages in use:\n")[2]
    assert [line.split()[0] for line in in_use.splitlines()] == ["triton", "torch"]
    assert max(map(len, result.stdout.splitlines())) <= WIDTH


def test_what_is_missing_comes_once_at_the_end(on):
    on(BARE)
    result = call("explain", NEMOTRON)
    assert result.exit_code == 0
    head, _, tail = result.stdout.partition("Missing here:")
    assert "not triton.core: triton not installed" in head
    assert "not mamba_ssm.core: mamba_ssm not installed; causal_conv1d not installed" in head
    assert "pip install" not in head
    assert tail.count(registry.package("causal_conv1d").install + "\n") == 1
    assert max(map(len, result.stdout.splitlines())) <= WIDTH


def test_json_says_the_same(on):
    on(BARE)
    data = json.loads(call("explain", TINY, "--json", "--dtype", "fp32").stdout)
    assert (data["ok"], data["parts"], data["dtype"], data["machine"]["device"]) == (True, "auto", "fp32", "cuda")
    rows = {row["label"]: row for row in data["rows"]}
    names = [slot["slot"] for slot in rows["model"]["slots"]]
    assert names == [f"model.{slot.name}" for slot in registry.FRAME]
    conv = next(slot for slot in rows["M"]["slots"] if slot["slot"] == "mamba2.conv")
    assert conv["part"] == "reference"
    assert conv["refused"] == [
        {"part": f"{name}.conv", "reason": f"{missing} not installed"}
        for name, *lacks in (("triton", "triton"), ("causal_conv1d", "causal_conv1d", "triton"), ("fla", "fla"))
        for missing in lacks
    ]
    package = next(p for p in data["packages"] if p["name"] == "mamba_ssm")
    assert package["missing"] == "not installed" and package["install"].startswith("pip install")


def test_another_machine_has_every_package(on):
    on(Machine("cpu"))
    found = call("explain", "-e", "M A F", "--set", "d_model=512", "--parts", "te", "--device", "cuda").stdout
    assert "a machine with an NVIDIA GPU and every package" in found and "te.norm_linear" in found
    on(BARE)
    assert "without" not in call("explain", "-e", "M", "--device", "cpu").stdout
    assert call("explain", "-e", "M", "--device", "cuda", "--parts", "fused").exit_code == 1


def test_a_set_that_cannot_be_had_is_exit_1(on):
    on(Machine("cpu"))
    result = call("explain", NEMOTRON, "--parts", "fused")
    assert result.exit_code == 1 and result.stderr.count("error[E902]") == 5 and not result.stdout
    data = json.loads(call("explain", NEMOTRON, "--parts", "fused", "--json").stdout)
    assert data["ok"] is False and {d["code"] for d in data["diagnostics"]} == {"E902"}


def test_a_block_of_the_text(on):
    on(GPU)
    text = "layer M = mamba2(heads=8) stack { M M } parts mine : fused { M.core = mamba_ssm.core(keep=none) }"
    found = call("explain", "-e", text, "--set", "d_model=256", "--parts", "mine").stdout
    assert "mamba_ssm.core(keep=none)" in found and "`M.core` in the parts block, line 1" in found


@pytest.mark.parametrize(
    "args, words",
    [
        (["explain"], "give a FILE"),
        (["explain", TINY, "-e", "M"], "only one"),
        (["explain", TINY, "--parts", "fusd"], "did you mean `fused`?"),
        (["explain", "mamba2", "--parts", "te"], "goes with a model"),
        (["explain", "mamba_ssm.cor"], "did you mean `mamba_ssm.core`"),
        (["explain", "nothing_like_it"], "there is nothing about"),
        (["plan", TINY, "--parts", "fusd"], "did you mean `fused`?"),
    ],
)
def test_bad_usage(args, words, on):
    on(Machine("cpu"))
    result = call(*args)
    assert result.exit_code == 2 and words in result.stderr


def test_plan_and_compile_print_the_table(on, tmp_path):
    on(Machine("cpu"))
    plan = call("plan", NEMOTRON, "--stages", "2", "--parts", "te")
    assert plan.exit_code == 0
    assert plan.stdout.startswith(call("plan", NEMOTRON, "--stages", "2").stdout) and "te.norm_linear" in plan.stdout
    compiled = call("compile", TINY, "--parts", "fused", "-o", str(tmp_path))
    assert compiled.exit_code == 0 and "triton.core" in compiled.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["parts"] == "fused"
    on_cpu = call("plan", NEMOTRON, "--stages", "2", "--parts", "fused", "--device", "cpu")
    assert on_cpu.exit_code == 1 and "error[E902]" in on_cpu.stderr
    data = json.loads(call("plan", TINY, "--stages", "2", "--parts", "auto", "--json").stdout)
    assert data["assignment"]["parts"] == "auto" and data["plan"]


@pytest.mark.parametrize("name", topics())
def test_pages_of_parts_and_packages(name):
    result = call("explain", name)
    assert result.exit_code == 0 and result.stdout == page(name).text
    part = registry.part(name)
    for words in (*part.slots, *(field.name for field in part.args)) if part else registry.package(name).modules:
        assert words in result.stdout


def test_nothing_heavy_is_loaded_without_a_gpu():
    if environment.has_gpu():
        pytest.skip("with a GPU, another process is asked")
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom mambadsl.cli.commands import cli\n"
        f"assert CliRunner().invoke(cli, ['explain', {TINY!r}]).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'networkx', 'triton'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documented_block_says_what_runs():
    block = re.search(r"```\n(parts mine : fused \{\n(?:.*\n)*?\}\n)```", DOCS.read_text())[1]
    text = "layer L = mamba2(d_state=64) layer N = mamba2(d_state=32) stack { M L N A }\n" + block
    found = assign(load(text=text).layers, parts="mine", machine=GPU)
    told = [found.of(f"stack.{n}") for n in range(4)]
    assert [slots["core"].text for slots in told] == [
        "triton.core", "mamba_ssm.core(keep=none)", "nothing", "torch.attention(backend=cudnn)",
    ]
    assert told[2]["scan"].part == "reference" and told[2]["conv"].part == "triton.conv"


def test_the_documented_output_is_real(on, request):
    import shlex

    on(Machine("cpu"))
    text = DOCS.read_text()
    console = re.compile(r"```console\n\$ mambadsl (.*)\n((?:.*\n)*?)```\n")
    made = console.sub(lambda m: f"```console\n$ mambadsl {m[1]}\n{call(*shlex.split(m[1])).output}```\n", text)
    if request.config.getoption("--renew"):
        DOCS.write_text(made)
    assert made == DOCS.read_text() and console.search(text)
