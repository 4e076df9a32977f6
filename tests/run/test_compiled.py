"""Compiled folders: the same bytes for the same model, back without the text, and refused where changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mambadsl
from mambadsl import MdlError, load
from mambadsl.graph import json as graph_json
from mambadsl.run.compiled import load_compiled, save

TEXT = """
model toy { d_model = 64 vocab = 100 context = 128 }
layer M = mamba2(head_dim=16)
shared S = [A F]
stack { M*3 S | M S(adapter=lora(rank=2)) }
parts mine : reference { M.scan = x.y(a=1 / 3) }
"""


@pytest.fixture
def folder(tmp_path):
    program = load(text=TEXT)
    paths = save(program, program.plan(stages=2, device="cpu"), tmp_path / "out" / "deep", parts="auto")
    assert [path.name for path in paths] == ["graph.json", "plan.json", "summary.txt"]
    return tmp_path / "out" / "deep"


def refused(folder, *words: str) -> None:
    with pytest.raises(MdlError) as caught:
        load_compiled(folder)
    assert caught.value.diagnostics[0].code.id in ("E903", "E062")
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_there_and_back(folder):
    program = load(text=TEXT)
    again = load_compiled(folder)
    assert again.checked.graph == program.layers
    assert again.plan == program.plan(stages=2, device="cpu")
    assert again.parts == "auto" and len(again.sha256) == 64
    assert load_compiled(str(folder)).sha256 == again.sha256


def test_same_input_same_bytes(folder, tmp_path):
    program = load(text=TEXT)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load(text="M A F").plan(stages=3)
    save(program, program.plan(stages=2, device="cpu"), folder, parts="auto")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    code = (
        "import mambadsl, sys\nfrom mambadsl.run.compiled import save\n"
        "p = mambadsl.load(text=sys.argv[1])\nsave(p, p.plan(stages=2, device='cpu'), sys.argv[2], parts='auto')\n"
    )
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(mambadsl.__file__).parent.parent)}
        subprocess.run([sys.executable, "-c", code, TEXT, tmp_path / seed], env=env, check=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} == before


def test_another_model_is_another_hash(folder, tmp_path):
    program = load(text=TEXT.replace("M*3", "M*2"))
    save(program, program.plan(stages=2, device="cpu"), tmp_path / "b")
    assert load_compiled(folder).sha256 != load_compiled(tmp_path / "b").sha256


@pytest.mark.parametrize("name", ["graph.json", "plan.json"])
def test_missing_and_unreadable(folder, name):
    path = folder / name
    for data in (
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"graph": 1, "sha256": 2}',
    ):
        path.write_bytes(data)
        refused(folder, name)
    path.unlink()
    refused(folder, name, "No such file")
    path.mkdir()
    refused(folder, "not a regular file")
    path.rmdir()
    path.symlink_to("/dev/zero")
    refused(folder, "not a regular file")


def test_no_folder_at_all(tmp_path):
    refused(tmp_path / "nowhere", "cannot be read")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "cannot be read")


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("graph.json", '"d_model": 64', '"d_model": 128'),
        ("plan.json", '"parts": "auto"', '"parts": "fused"'),
        ("plan.json", '"microbatches": ', '"microbatches": 1'),
        ("plan.json", '"schedule": "1f1b"', '"schedule": "gpipe"'),
    ],
)
def test_tampering(folder, name, old, new):
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    refused(folder, "was changed")


def test_an_older_or_newer_format(folder):
    for name in ("graph.json", "plan.json"):
        path = folder / name
        text = path.read_text()
        path.write_text(text.replace('"version": 1', '"version": 7'))
        refused(folder, "format 7")
        path.write_text(text)


def forge(folder, change) -> None:
    """A plan with the right hash and another content."""
    data = json.loads((folder / "plan.json").read_text())
    data.pop("sha256")
    change(data)
    (folder / "plan.json").write_text(json.dumps({"sha256": graph_json.content_hash(data), **data}))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("plan"),
        lambda d: d.update(plan=3),
        lambda d: d["plan"].pop("stages"),
        lambda d: d["plan"].update(stages=[]),
        lambda d: d["plan"]["stages"].pop(),
        lambda d: d["plan"].update(cuts=[0, 1]),
        lambda d: d["plan"].update(more=1),
        lambda d: d["plan"]["stages"][0].update(paths=[]),
        lambda d: d.update(graph="0" * 64),
    ],
    ids=range(9),
)
def test_a_forged_plan_is_refused_without_a_crash(folder, change):
    forge(folder, change)
    refused(folder)


def test_plan_and_graph_of_two_compilations(folder, tmp_path):
    program = load(text="M A F M")
    save(program, program.plan(stages=2, device="cpu"), tmp_path / "b")
    (folder / "plan.json").write_bytes((tmp_path / "b" / "plan.json").read_bytes())
    refused(folder, "different compilations")
