"""The stages one after the other, as users hold them: `load`, `Program`; and how loading fails."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import mambadsl
from mambadsl import Facts, MdlError, load
from mambadsl.compile import Program, compile_source, program_from_graph
from mambadsl.files import MODELS
from mambadsl.text.source import from_text

TINY = MODELS / "tiny.mdl"


def test_a_program_has_every_stage():
    program = load(TINY)
    assert program.spec.name == program.layers.name == "tiny"
    assert program.layers is program.checked.graph
    assert program.graph.number_of_nodes() == len(program.layers.nodes)
    assert program.cost().params == program.cost(length=3).params
    assert program.cost(length=64).flops.forward != program.cost(length=1024).flops.forward
    assert load(text=program.write()).layers == load(text=program.expand()).layers == program.layers
    assert "# default" in program.expand(origin=True)
    with pytest.raises(FrozenInstanceError):
        program.spec = None


def test_plans():
    plan = load(TINY).plan(stages=2, device="cpu")
    assert len(plan.stages) == 2
    assert [p for s in plan.stages for p in s.paths] == [n.path for n in load(TINY).layers.nodes]


def test_facts_are_checked():
    with pytest.raises(MdlError, match="E201"):
        load(text="M(heads=6)", facts=Facts(tp=4))
    assert load(text="M(heads=6)")


def test_warnings_do_not_stop_and_are_kept():
    program = load(text="layer W = A stack { M*9 A }")
    assert [d.code.id for d in program.diagnostics if d.severity == "warning"] == ["W029"]


def test_a_path_or_text_and_not_both():
    for wrong in ({}, {"path": TINY, "text": "M"}):
        with pytest.raises(TypeError, match="a path, or text="):
            load(**wrong)
    assert load(str(TINY)).layers == load(path=Path(TINY)).layers


@pytest.mark.parametrize(
    "text, code",
    [
        ("M (", "E012"),
        ("MMMA", "E020"),
        ("stack { | }", "E029"),
        ("layer W = A", "E029"),
        ("A(heads=6, kv_heads=4)", "E204"),
        ("stack { M } expect layers == 2", "E050"),
        ("M\0", "E003"),
        ("", "E010"),
        ("M " * 200_000, "E002"),
    ],
)
def test_each_stage_refuses_with_its_own_problems_only(text, code):
    with pytest.raises(MdlError) as caught:
        load(text=text)
    assert {d.code.id for d in caught.value.diagnostics if d.severity == "error"} == {code}


def test_no_stage_runs_after_one_that_failed():
    """A broken text has no broken names, and broken names no broken sizes."""
    with pytest.raises(MdlError) as caught:
        load(text="stack { Q A(heads=6, kv_heads=4) } expect layers == 7")
    assert [d.code.id for d in caught.value.diagnostics] == ["E020"]


def test_files_that_cannot_be_read(tmp_path):
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no.mdl", "there is no file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / ("x" * 5000), "cannot be read"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(MdlError, match=words):
            load(path)
    with pytest.raises(MdlError, match="did you mean"):
        load(TINY.with_name("tny.mdl"))


def test_errors_travel_between_processes():
    with pytest.raises(MdlError) as caught:
        load(text="MMMA")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_programs_from_graphs():
    program = load(TINY)
    again = program_from_graph(program.layers)
    assert isinstance(again, Program) and again.layers == program.layers
    assert load(text=again.expand()).layers == program.layers


def test_a_checked_graph_is_made_by_the_checker_only():
    from mambadsl.graph.checks import CheckedGraph

    with pytest.raises(TypeError, match="check"):
        CheckedGraph(load(TINY).layers, Facts(), (), object())


def test_names_of_the_package():
    assert set(mambadsl.__all__) <= set(dir(mambadsl))
    for name in mambadsl.__all__:
        if name != "load_compiled":
            assert getattr(mambadsl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mambadsl.lod


def test_the_same_text_gives_the_same_text_in_every_process():
    """No set or hash order shows."""
    code = (
        "import mambadsl\n"
        "p = mambadsl.load(text='shared S = [A F] shared T = M+A stack { T [M S]*2 E | T } mtp { F }')\n"
        "print(p.write(), p.expand(), [str(d) for d in p.diagnostics])\n"
        "from mambadsl.graph.json import dumps\nprint(dumps(p.layers))\n"
        "try: mambadsl.load(text='layer A = B layer B = C layer C = A stack { Q A } parts p { Q.x = y }')\n"
        "except mambadsl.MdlError as e: print(e)\n"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(mambadsl.__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(outs) == 1


def test_compiling_a_source():
    assert compile_source(from_text("M A", name="x.mdl"), set={"d_model": "64"}).layers.model.d_model == 64


def test_facts_are_facts():
    with pytest.raises(TypeError, match="mambadsl.Facts"):
        mambadsl.load(text="M", facts={"tp": 2})
    with pytest.raises(MdlError, match="E201|E202"):
        mambadsl.load(text="M", facts=mambadsl.Facts(tp=7))
