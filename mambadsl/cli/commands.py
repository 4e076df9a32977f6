"""The group of all commands, each imported when asked for; and what happens when one fails.

A command file has `run`, made by `@command(...)`. Problems of a model are exit 1 and belong to the command;
here: bad usage (2), Ctrl-C (130), a reader that went away (141), and what should not happen (70).
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from keyword import iskeyword
from typing import Any, NoReturn

import click

from mambadsl import __version__
from mambadsl.cli import output

COMMANDS = (
    "check", "compile", "plan", "train", "expand", "fmt", "summary", "graph", "explain", "doctor", "generate",
    "import", "export", "verify", "completion",
)
BUG, INTERRUPTED, READER_GONE = 70, 130, 141


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        # `import` is a word that no module of Python can be imported by.
        file = f"{name}_" if iskeyword(name) else name
        return import_module(f"mambadsl.cli.{file}").run if name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(_no_command(args[0]), ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            code = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            # Nobody reads any more: what is left in the buffer must not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE
        return code

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:
            code = INTERRUPTED
        except Exception as error:
            if os.environ.get("MAMBADSL_DEBUG"):
                raise
            output.bug(error)
            code = BUG
        sys.exit(code or 0)


def _no_command(word: str) -> str:
    from mambadsl.text.spell import nearest

    near = nearest(word, COMMANDS)
    if near:
        return f"there is no command `{word}`; did you mean `{near}`?"
    if word.endswith(".mdl"):
        return f"a command comes first: `mambadsl check {word}`"
    return f"there is no command `{word}`; commands: {', '.join(COMMANDS)}"


@click.group(
    "mambadsl", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, message="mambadsl %(version)s")
def cli() -> None:
    """A compiler for hybrid state-space / attention language models.

    FILE is a model file; `-` is standard input; `-e "M M M A"` gives the text itself. Every command has --json
    and examples in its --help. Exit codes: 0 fine, 1 problems found, 2 bad usage.
    """
