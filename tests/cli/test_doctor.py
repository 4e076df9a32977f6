"""`doctor`: what processes say is sorted rightly, right parts pass, wrong ones do not, and nothing takes it down."""

from __future__ import annotations

import json
import textwrap
import time

import pytest
from click.testing import CliRunner
from parts_fakes import forgotten

from mambadsl import load
from mambadsl.cli.commands import cli
from mambadsl.kinds.registry import all_kinds
from mambadsl.parts import registry
from mambadsl.parts.part import Package, Part
from mambadsl.run.doctor import child, environment, packages, report
from mambadsl.run.doctor.child import Ended, ask
from mambadsl.run.doctor.environment import Environment, has_gpu
from mambadsl.run.doctor.kernels import TEXT, check
from mambadsl.run.doctor.packages import CAUSES, Loaded, classify
from mambadsl.run.doctor.report import Report, Tried, try_part
from mambadsl.run.doctor.text import WIDTH, report_text

#: What people's machines said (issues of the packages), and what it means.
SAID = [
    ("ImportError", "/x/causal_conv1d_cuda.cpython-312-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda9SetDeviceEi",
     "built against another torch"),
    ("ImportError", "libcudart.so.12: cannot open shared object file: No such file or directory",
     "built for another CUDA"),
    ("OSError", "libcudnn.so.9: cannot open shared object file: No such file or directory", "cuDNN is missing"),
    ("OSError", "libnccl.so.2: cannot open shared object file: No such file or directory",
     "a shared library is missing"),
    ("RuntimeError", "CUDA error: no kernel image is available for execution on the device", "built for other GPUs"),
    ("RuntimeError", "The NVIDIA driver version is insufficient for CUDA runtime version",
     "the driver is older than its CUDA"),
    ("ImportError", "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by /x/y.so)",
     "built on a newer system"),
    ("NameError", "name 'bare_metal_version' is not defined", "needs the CUDA toolkit"),
    ("ImportError", "cannot import name 'GreedySearchDecoderOnlyOutput' from 'transformers.generation'",
     "not the version tested"),
    ("ModuleNotFoundError", "No module named 'selective_scan_cuda'", "built without its CUDA code"),
    ("ValueError", "something else", "does not load"),
]
PACKAGE = Package(
    "p", "a package", ("p",), "pip install --no-build-isolation p", tested="1.0", fixes={"something odd": "be even"}
)


def ended(*answers, code=0, error="") -> Ended:
    return Ended(answers, code, error, 0.1)


@pytest.mark.parametrize("type, error, state", SAID, ids=[state for _, _, state in SAID])
def test_what_loaders_say(type, error, state):
    answer = {"loads": False, "type": type, "error": error, "absent": None}
    found, said, fix = classify(PACKAGE, ended(answer), cuda="13.0")
    assert found == state and error in said
    assert any(line.startswith("pip install") for line in fix) and not any("{" in line for line in fix)
    assert {state for _, _, state in SAID} >= {cause.state for cause in CAUSES}


def test_other_ends():
    assert classify(PACKAGE, ended({"loads": True})) == ("ok", "", ())
    state, _, fix = classify(PACKAGE, ended(code=-11))
    assert state == "crashes Python (SIGSEGV)"
    assert fix[-1] == "pip install --force-reinstall --no-cache-dir --no-deps --no-build-isolation p"
    assert classify(PACKAGE, ended(code=None))[0].startswith("no end after")
    assert classify(PACKAGE, ended(code=3, error="a\nlast words\n"))[:2] == ("ends Python (exit 3)", "last words")
    absent = {"loads": False, "type": "ModuleNotFoundError", "error": "No module `einops.x`", "absent": "einops.x"}
    assert classify(PACKAGE, ended(absent))[::2] == ("a dependency is missing", ("pip install einops",))
    odd = {"loads": False, "type": "E", "error": "something odd", "absent": None}
    assert classify(PACKAGE, ended(odd))[2] == ("be even",)


@pytest.fixture
def parts(tmp_path):
    """parts(body): a loaded file with the package `probe`; body: of `make_act(**args)`, `real` is the reference."""

    def load(body: str, *, load: str = "", more: str = ""):
        from mambadsl.parts.plugins import load_parts

        path = tmp_path / "probe_parts.py"
        path.write_text(textwrap.dedent("""
            import os, signal, time
            from mambadsl.parts.part import Package, Part

            def make_act():
                import torch
                from mambadsl.kinds.activations import activate as real
                def act(h, **how):
                    {body}
                return act

            def load():
                {load}

            PACKAGE = Package("probe", "for tests", ("torch",), "pip install probe", load=__name__ + ":load" * {loads},
                parts=(Part("probe.act", ("mlp.act",), "an activation", make_act, devices=("cpu", "cuda"), {more}),))
        """).format(body=body, load=load or "pass", loads=1, more=more))
        load_parts(path)

    with forgotten():
        yield load


@pytest.fixture
def here(monkeypatch):
    """A machine without a GPU, not looked at."""
    found = Environment("3.12", "Linux", {"torch": "2.11.0", "cuda": False}, *[None] * 6)
    monkeypatch.setattr(environment, "look", lambda: found)


def tried() -> list[Tried]:
    """In this process: what is asked in another one is asked the same way."""
    return [Tried(**row) for row in check("probe.act", "mlp.act")]


def test_a_right_part_passes(parts):
    parts("return real(h, **how)")
    rows = tried()
    assert [(row.dtype, row.status) for row in rows] == [("fp32", "ok"), ("bf16", "ok")]
    assert all(row.forward_error == row.gradients_error == row.decoding_error == 0 and row.ms > 0 for row in rows)


def test_a_part_with_a_wrong_gradient_is_found(parts):
    parts("y = real(h, **how); return y.detach() + 1.05 * (y - y.detach())")
    rows = tried()
    assert [row.status for row in rows] == ["wrong", "wrong"]
    assert all(row.forward_error == 0 and row.gradients_error > 0.02 and "gradients of" in row.detail for row in rows)


@pytest.mark.parametrize(
    "body, status, words",
    [
        ("return 1.04 * real(h, **how)", "wrong", "forward"),
        ("return real(h, **how) * float('nan')", "wrong", "nan"),
        ("y = real(h, **how); return y if h.shape[1] > 1 else 2 * y", "wrong", "decoding"),
        ("raise RuntimeError('no such thing')", "failed", "RuntimeError: no such thing"),
    ],
)
def test_parts_that_are_not_right(parts, body, status, words):
    parts(body, more="dtypes=('fp32',)")
    row, = tried()
    assert row.status == status and words in row.detail


@pytest.mark.parametrize("best, status", [("argmax", "ok"), ("argmin", "wrong")])
def test_the_choice_of_tokens_is_tried(best, status):
    """The engine's own slots are looked at through the engine."""

    def make():
        def next_token(logits_BV, token_B, history_TB, written_1):
            token_B.copy_(getattr(logits_BV, best)(-1))
            history_TB.index_copy_(0, written_1, token_B[None])
            written_1.add_(1)

        return next_token

    part = Part("probe.next", ("model.next_token",), "a choice", make, dtypes=("fp32",), devices=("cpu", "cuda"))
    with forgotten():
        registry.add(Package("probe", "for tests", ("torch",), parts=(part,)))
        row, = check("probe.next", "model.next_token")
    assert row["status"] == status and (status == "ok" or "the tokens chosen" in row["detail"])


@pytest.mark.parametrize(
    "body, limit_s, status, words",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 60, "crashed", "SIGSEGV"),
        ("time.sleep(600)", 5, "no end", "nothing more after 5 s"),
    ],
)
def test_a_part_takes_down_its_own_process_only(parts, body, limit_s, status, words):
    parts(body, more="dtypes=('fp32',)")
    row, = try_part("probe.act", ("mlp.act",), limit_s=limit_s)
    assert row.status == status and words in row.detail


def test_what_ends_doctor_ends_its_processes(parts, monkeypatch):
    """Ctrl-C, while one part hangs and others wait for their turn."""
    parts("time.sleep(600)", more="dtypes=('fp32',)")
    monkeypatch.setattr(report, "PROCESSES", 2)
    asked, started = [], time.monotonic()

    def look(what: str) -> None:
        if what == "Ctrl-C":
            while not child._running:
                time.sleep(0.01)
            raise KeyboardInterrupt
        asked.append(what)
        list(try_part("probe.act", ("mlp.act", "mlp.act"), limit_s=300))

    with pytest.raises(KeyboardInterrupt):
        report._side_by_side(look, ["Ctrl-C", "hangs", "waits"])
    assert time.monotonic() - started < 60 and not child._running and "hangs" in asked
    assert ask("facts", limit_s=60).answers


def test_slots_after_a_crash_are_tried_too(parts):
    parts("os._exit(3)", more="dtypes=('fp32',)")
    rows = list(try_part("probe.act", ("mlp.act", "attention.core")))
    assert [(row.slot, row.status) for row in rows] == [("mlp.act", "crashed"), ("attention.core", "refused")]
    assert rows[0].detail == "exit 3" and "does not fill" in rows[1].detail


def test_the_command_on_a_package_of_parts(parts, here):
    parts("return real(h, **how)", more="dtypes=('fp32',)")
    result = CliRunner().invoke(cli, ["doctor", "probe"])
    assert result.exit_code == 0 and "Nothing that is installed is broken." in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= WIDTH


def test_a_package_that_is_broken_is_exit_1(parts, here):
    parts("return h", load="raise ImportError('x.so: undefined symbol: _ZN3c10')")
    result = CliRunner().invoke(cli, ["doctor", "probe", "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 1 and data["ok"] is False
    one, = data["packages"]
    assert one["state"] == "built against another torch" and "pip install --force-reinstall" in one["fix"][-1]
    assert [(row["part"], row["status"]) for row in data["parts"]] == [("probe.act", "not here")]


def test_what_is_not_installed_is_not_broken():
    with forgotten():
        registry.add(Package("absent", "not there", ("no_such_module_here",), "pip install absent"))
        found = packages.look(registry.package("absent"))
        assert (found.state, found.broken, found.fix) == ("not installed", False, ("pip install absent",))
        registry.add(Package("half", "its dependency is not there", ("json", "no_such_module_here")))
        assert packages.look(registry.package("half")).fix == ("pip install no_such_module_here",)


def test_without_a_gpu_other_parts_say_so():
    if has_gpu():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(cli, ["doctor", "triton", "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and {row["detail"] for row in data["parts"]} == {"needs a GPU"}
    assert {row["part"] for row in data["parts"]} == {part.name for part in registry.package("triton").parts}
    assert data["environment"]["facts"]["torch"] and data["environment"]["python"]


def test_an_unknown_package_is_bad_usage():
    result = CliRunner().invoke(cli, ["doctor", "mamba_sm"])
    assert result.exit_code == 2 and "did you mean `mamba_ssm`?" in result.stderr


def test_a_machine_with_a_gpu_is_asked_elsewhere(monkeypatch):
    missing = {"te": "not installed", "torch": None}
    facts = {"cuda": True, "gpu": "NVIDIA H200", "capability": [9, 0], "missing": missing}
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    monkeypatch.setattr(environment, "ask", lambda *words, limit_s: ended(facts))
    here = environment.this_machine()
    assert (here.device, here.name, here.capability) == ("cuda", "NVIDIA H200", (9, 0))
    assert here.missing(registry.package("te")) == "not installed" and here.missing(registry.package("torch")) is None
    monkeypatch.setattr(environment, "ask", lambda *words, limit_s: ended(code=-11))
    result = CliRunner().invoke(cli, ["explain", "-e", "M"])
    assert result.exit_code == 1 and "SIGSEGV" in result.stderr and "mambadsl doctor" in result.stderr
    data = json.loads(CliRunner().invoke(cli, ["explain", "-e", "M", "--json"]).stdout)
    assert data["ok"] is False and "SIGSEGV" in data["error"]


def test_every_kind_has_a_layer_to_try_parts_on():
    for kind in all_kinds():
        slot = f"{kind.name}.{kind.slots[0].name}"
        model = load(text=TEXT.format(layer=kind.example, slot=slot, part="reference")).build(device="meta")
        assert model.assignment.rows[-1].kind == kind.name


def test_a_process_that_hangs_is_ended():
    assert ask("facts", limit_s=0.2).code is None


def test_a_report_s_text(golden):
    facts = {
        "torch": "2.11.0+cu130", "torch_cuda": "13.0", "cudnn": "9.10.2", "cuda": True, "gpu": "NVIDIA H200",
        "capability": [9, 0], "gpu_memory": 150 * 10**9, "gpus": 2, "built_for": ["sm_90"],
    }
    here = Environment(
        "3.12.3 (/usr/bin/python3)", "Linux x86_64, glibc 2.39", facts, "3.6.0", "580.65.06", None, None, None, None,
        ("no nvcc: packages that are built from source need the CUDA toolkit of 13.0",),
    )
    broken = {"loads": False, "type": "ImportError", "error": "x.so: undefined symbol: _ZN3c104", "absent": None}
    conv, ssm = registry.package("causal_conv1d"), registry.package("mamba_ssm")
    loaded = (
        Loaded(conv, "1.7.0", "ok", seconds=3.0),
        Loaded(ssm, "2.3.2", *classify(ssm, ended(broken))),
        Loaded(registry.package("te"), None, "not installed", fix=(registry.package("te").install,)),
        Loaded(registry.package("triton"), "3.6.0", "ok", seconds=1.0),
    )
    rows = (
        Tried("causal_conv1d.conv", "mamba2.conv", "ok", "bf16", "", 1e-3, 2e-3, 0.0, 0.4, 1.25, 3.0),
        Tried("causal_conv1d.conv", "mamba1.conv", "wrong", "bf16", "forward: 3.0e-01 off, 1.0e-02 allowed", 0.3, 0.3,
              0.3, 0.4, 1.25, 3.0),
        Tried("triton.core", "mamba2.core", "ok", "bf16", "", 1e-3, 2e-3, 1e-3, 0.5, 2.5, 3.0),
        Tried("mamba_ssm.core", "mamba2.core", "not here", detail="needs mamba_ssm"),
        Tried("te.linear", "mlp.up_proj", "crashed", detail="SIGSEGV"),
    )
    found = Report(here, loaded, rows)
    assert not found.ok
    golden("doctor.txt", report_text(found))
