"""The program as the shell runs it: exit codes, pipes, and what it must not load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from mambadsl.files import MODELS

PROGRAM = [sys.executable, "-c", "from mambadsl.cli import main; main()"]
TINY = str(MODELS / "tiny.mdl")


def run(*args: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([*PROGRAM, *args], check=False, capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize("args, code", [(("check", TINY), 0), (("check", "-e", "Q"), 1), (("check",), 2), ((), 2)])
def test_exit_codes(args, code):
    done = run(*args)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_standard_input():
    done = run("check", "-", input="M M M A")
    assert done.returncode == 0 and done.stdout.startswith("<stdin>: 4 layers")


def test_standard_input_that_is_closed():
    done = run("check", "-", stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_reader_that_goes_away():
    with subprocess.Popen(
        [*PROGRAM, "summary", TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 141 and not error


def test_ctrl_c_without_a_traceback():
    with subprocess.Popen(
        [*PROGRAM, "check", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs in the background of a shell ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdin is not None
        process.stdin.write("M ")
        process.stdin.flush()
        # It waits for the end of its input by then.
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    file = tmp_path / "secret.mdl"
    file.write_text("M")
    file.chmod(0)
    done = run("check", str(file))
    assert done.returncode == 1 and "E001" in done.stderr


def test_a_terminal_without_unicode():
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = run("fmt", "-e", "M A  # \u0101", env=env)
    assert done.returncode == 0 and done.stdout == "M A  # \\u0101\n"


@pytest.mark.parametrize(
    "args",
    [
        ["check", TINY],
        ["plan", TINY, "--stages", "2"],
        ["expand", TINY],
        ["fmt", "--check", TINY],
        ["summary", TINY],
        ["graph", TINY, "--as", "svg"],
        ["compile", TINY, "-o", "out"],
        ["explain", "mamba2"],
        ["explain", "codes"],
    ],
    ids=lambda a: a[0],
)
def test_nothing_slow_is_loaded(args, tmp_path):
    script = (
        "import sys, click\n"
        "from mambadsl.cli.commands import cli\n"
        f"try: cli({args!r})\n"
        "except SystemExit as e: print(e.code)\n"
        "print([m for m in ('torch', 'numpy', 'networkx', 'rich', 'lark') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-2:] == ["0", "[]"], done.stderr


def test_import_is_bare():
    script = "import sys, mambadsl; print(sorted(m for m in sys.modules if m.startswith('mambadsl')))"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['mambadsl']"


def test_help_and_version():
    from mambadsl import __version__

    assert run("--version").stdout == f"mambadsl {__version__}\n"
    assert run("--help").returncode == 0
