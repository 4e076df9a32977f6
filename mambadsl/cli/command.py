"""What all commands have: `--json`, examples in the help, and problems printed the same way.

`@command("check", examples=...)` makes a function with `as_json` a click command; it returns an exit code or
None. With `--json`, standard output is one JSON object whatever happens, bad usage apart: `{"ok": ..., ...}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from mambadsl.cli import output


class Command(click.Command):
    """examples: command lines that work in a checkout of the project (a test runs them)."""

    examples: tuple[str, ...] = ()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def invoke(self, ctx: click.Context) -> Any:
        from mambadsl.text.diagnostic import MdlError

        try:
            return super().invoke(ctx)
        except MdlError as error:
            output.failed(error.diagnostics, as_json=ctx.params["as_json"])
            return 1
        except click.ClickException as error:
            if isinstance(error, click.UsageError) or not ctx.params["as_json"]:
                raise
            output.refused(error.message)
            return error.exit_code


def command(name: str, *, examples: tuple[str, ...]) -> Callable[[Callable], Command]:
    def wrap(function: Callable) -> Command:
        as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
        made = click.command(name, cls=Command)(as_json(function))
        made.examples = examples
        return made

    return wrap
