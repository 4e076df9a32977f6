"""Parts and kinds of other people: files by `--load` and `load_parts`, installed plugins by their entry points."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from parts_fakes import forgotten

import mambadsl
from mambadsl.cli.commands import cli
from mambadsl.text.diagnostic import MdlError

DOCS = Path(__file__).parent.parent.parent / "docs" / "parts.md"
#: The examples of docs/parts.md: the title line of each says its file.
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n((?:.*\n)*?)```\n", DOCS.read_text()))
MODEL = "model m {{ vocab = 64 d_model = 32 context = 32 }} layer M = {layer} stack {{ M }} {more}"


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(path: Path):
    with pytest.raises(MdlError) as caught:
        mambadsl.load_parts(path)
    one, = caught.value.diagnostics
    assert one.code.id == "E908"
    return one


def test_the_documented_part_fills_a_slot_and_runs(tmp_path):
    path = write(tmp_path, "my_parts.py", EXAMPLES["my_parts.py"])
    found = mambadsl.load_parts(path)
    assert mambadsl.load_parts(path) is found and [p.name for p in found.packages] == ["my"]
    more = "parts mine : reference { mlp.act = my.act(pieces=3) }"
    program = mambadsl.load(text=MODEL.format(layer="mlp(d_ff=64, gated=true)", more=more))
    tokens = torch.arange(24).view(2, 12)
    plain, mine = program.build(), program.build(parts="mine")
    assert mine.assignment.of("stack.0")["act"].text == "my.act(pieces=3)"
    slot = [model.get_submodule("stack.0.mixer").parts["act"] for model in (plain, mine)]
    assert slot[0] is not slot[1]
    assert list(plain.state_dict()) == list(mine.state_dict())
    torch.testing.assert_close(mine(tokens), plain(tokens))
    for model in (plain, mine):
        model.loss(tokens).backward()
    for path, p in plain.named_parameters():
        torch.testing.assert_close(mine.get_parameter(path).grad, p.grad)


def test_the_documented_part_refuses_what_it_says(tmp_path):
    mambadsl.load_parts(write(tmp_path, "my_parts.py", EXAMPLES["my_parts.py"]))
    more = "parts mine : reference { mlp.act = my.act }"
    program = mambadsl.load(text=MODEL.format(layer="mlp(d_ff=64, recompute=true)", more=more))
    with pytest.raises(MdlError, match="computed again already"):
        program.build(parts="mine")


def test_the_documented_kind_is_checked_costed_and_built(tmp_path):
    mambadsl.load_parts(write(tmp_path, "my_kind.py", EXAMPLES["my_kind.py"]))
    program = mambadsl.load(text=MODEL.format(layer="ema(rank=4)", more="expect count(ema) == 1"))
    assert program.cost().params == 64 * 32 * 2 + 32 * 2 + 2 * 4 * 32 + 4
    model = program.build()
    tokens = torch.arange(24).view(2, 12)
    whole = model(tokens)
    for state in (model.init_state(2), model.init_state(2, capacity=12)):
        with torch.no_grad():
            steps = torch.cat([model(tokens[:, t : t + 1], state=state) for t in range(12)], 1)
        torch.testing.assert_close(whole, steps)
    model.loss(tokens).backward()
    assert "ema(rank=4)" in program.write()
    with pytest.raises(MdlError, match="has no field|unknown|`rnk`"):
        mambadsl.load(text="ema(rnk=4)")


def test_without_the_file_the_kind_is_unknown():
    with pytest.raises(MdlError, match="there is no kind `ema`"):
        mambadsl.load(text="ema(rank=4)")


@pytest.mark.parametrize(
    "text, words, line",
    [
        ("x = 1\n\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 3),
        ("def f():\n    return 1 / 0\n\nPACKAGE = f()\n", "ZeroDivisionError", 2),
        ("PACKAGE = (\n", "SyntaxError", 1),
        ("x = 1\n", "neither parts nor kinds", None),
        ("PACKAGE = 3\n", "a Package is expected", None),
        ("from mambadsl.parts.part import *\nPACKAGE = Package('torch', '', ())\n", "`torch` already", None),
        (
            "from mambadsl.parts.part import *\n"
            "PACKAGE = Package('q', '', (), parts=(Part('q.a', ('mamba2.scann',), '', ''),))\n",
            "no such slot", None,
        ),
        ("from mambadsl.kinds.registry import get\nKINDS = [get('mlp')]\n", "there is a kind `mlp` already", None),
    ],
)
def test_files_that_are_refused(tmp_path, text, words, line):
    one = refused(write(tmp_path, "bad.py", text))
    assert words in one.message
    assert (one.span.line if one.span else None) == line
    if "slot" in words:
        assert one.help == ("did you mean `mamba2.scan`?",)


def test_no_file():
    with pytest.raises(MdlError, match="there is no file"):
        mambadsl.load_parts("nowhere.py")


def test_a_model_file_never_runs_python(tmp_path):
    path = write(tmp_path, "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nPACKAGE = None\n")
    with pytest.raises(MdlError):
        mambadsl.load(text=f'from "{path}" import A\nstack {{ A }}')
    assert not (tmp_path / "ran").exists()


def test_the_option_on_commands(tmp_path):
    path = write(tmp_path, "my_kind.py", EXAMPLES["my_kind.py"])
    for command in ("check", "summary", "plan", "expand", "graph", "explain"):
        with forgotten():
            result = CliRunner().invoke(cli, [command, "--load", str(path), "-e", "ema(rank=4) M"])
            assert result.exit_code == 0, result.output
    broken = write(tmp_path, "broken.py", "import nothing_such\n")
    result = CliRunner().invoke(cli, ["check", "--load", str(broken), "-e", "M"])
    assert result.exit_code == 1 and "error[E908]" in result.stderr and "broken.py:1:1" in result.stderr
    result = CliRunner().invoke(cli, ["check", "--load", str(broken), "-e", "M", "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["diagnostics"][0]["code"] == "E908"


def test_an_installed_plugin_is_found_when_it_is_needed(tmp_path):
    """A distribution beside the others, in a process of its own."""
    write(tmp_path, "ema_plugin.py", EXAMPLES["my_kind.py"] + "print('imported')\n")
    info = tmp_path / "ema_plugin-1.0.dist-info"
    info.mkdir()
    write(info, "METADATA", "Metadata-Version: 2.1\nName: ema-plugin\nVersion: 1.0\n")
    write(info, "entry_points.txt", "[mambadsl.parts]\nema = ema_plugin\n")

    def said(text: str) -> str:
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport mambadsl\n{text}"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said("mambadsl.load(text='M A F')") == ""
    assert said("print(len(mambadsl.load(text='ema(rank=4) M').layers.layers))") == "imported\n2\n"
    write(tmp_path, "ema_plugin.py", "import nothing_such\n")
    words = said("try: mambadsl.load(text='ema(rank=4)')\nexcept mambadsl.MdlError as e: print(e)")
    assert "E908" in words and "ema = ema_plugin" in words and "pip uninstall ema-plugin" in words
