"""Help: every command has examples, and each of them runs."""

from __future__ import annotations

import glob
import shlex
import shutil

import pytest
from click.testing import CliRunner

from mambadsl.cli.commands import COMMANDS, cli
from mambadsl.files import MODELS

RUN = {name: cli.get_command(None, name) for name in COMMANDS}
EXAMPLES = [(name, line) for name, command in RUN.items() for line in command.examples]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert 2 <= len(RUN[name].examples) <= 4
    assert all(line in result.stdout for line in RUN[name].examples)


def test_overview_names_all_commands_in_whole_sentences():
    result = CliRunner().invoke(cli, ["--help"], terminal_width=80)
    listed = result.stdout.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in listed if line.strip()] == list(COMMANDS)
    assert "..." not in result.stdout.partition("Commands:")[2]


@pytest.mark.parametrize("name, line", EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_examples_run(name, line, tmp_path, monkeypatch):
    """In a copy of the shipped models. `a | b`: what `echo` says is b's input."""
    if name in ("generate", "import", "export", "verify"):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    shutil.copytree(MODELS, tmp_path / "models")
    shutil.copytree(MODELS.parent / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    said, _, rest = line.rpartition(" | ")
    words = shlex.split(rest)
    assert words[:2] == ["mambadsl", name]
    args = [
        found
        for word in words[1:]
        for found in (sorted(glob.glob(word)) or [word])
    ]
    result = CliRunner().invoke(cli, args, input=shlex.split(said)[1] if said else None)
    assert result.exit_code == 0, result.output
    assert result.stdout or name == "fmt" or {"-o", "github"} & set(args)
