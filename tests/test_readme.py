"""What the README shows is what happens: its commands and Python run, and their output stands there.

`pytest --renew tests/test_readme.py` writes the outputs anew.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CONSOLE = re.compile(r"```console\n\$ mambadsl (.*)\n((?:.*\n)*?)```\n")
PYTHON = re.compile(r"```python\n((?:.*\n)*?)```\n\n```output\n((?:.*\n)*?)```\n")


def _run(line: str) -> str:
    import shlex

    from mambadsl.cli.commands import cli

    result = CliRunner().invoke(cli, shlex.split(line))
    return result.output


def _python(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    return out.getvalue()


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_shown_output_is_real(request):
    text = README.read_text()
    made = CONSOLE.sub(lambda m: f"```console\n$ mambadsl {m[1]}\n{_run(m[1])}```\n", text)
    made = PYTHON.sub(lambda m: f"```python\n{m[1]}```\n\n```output\n{_python(m[1])}```\n", made)
    if request.config.getoption("--renew"):
        README.write_text(made)
    assert made == README.read_text()
    assert len(CONSOLE.findall(text)) >= 5 and len(PYTHON.findall(text)) >= 2


def test_the_model_shown_is_the_shipped_one():
    assert (ROOT / "models" / "nemotron_h_8b.mdl").read_text() in README.read_text()


def test_commands_named_exist():
    from mambadsl.cli.commands import cli

    said = re.findall(r"`mambadsl (\w+)|bin/mambadsl (\w+)|\$ mambadsl (\w+)", README.read_text())
    assert {"".join(words) for words in said} <= set(cli.list_commands(None))


def test_the_language_page_compiles():
    import mambadsl

    text = (ROOT / "docs" / "language.md").read_text()
    program = mambadsl.load(text=re.search(r"```\n((?:.*\n)*?)```\n", text)[1])
    assert program.layers.mtp is not None
