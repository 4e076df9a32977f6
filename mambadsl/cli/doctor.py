"""`mambadsl doctor`: what is installed here, whether it loads, and whether it computes what it should."""

from __future__ import annotations

import sys
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import loads_parts


class _Package(click.ParamType):
    name = "package"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from mambadsl.parts.registry import packages

        return [CompletionItem(name) for name in packages() if name.startswith(incomplete)]


@command(
    "doctor",
    examples=(
        "mambadsl doctor --quick torch",
        "mambadsl doctor causal_conv1d --json",
    ),
)
@click.argument("names", nargs=-1, type=_Package(), metavar="PACKAGE...")
@loads_parts
@click.option("--quick", is_flag=True, help="Run no kernels: only say what is installed and whether it loads.")
def run(names: tuple[str, ...], quick: bool, as_json: bool) -> int:
    """Look at this machine's packages and repair them.

    Each is imported in a process of its own, and each of its parts runs on a small layer, forward, backward and
    decoding, beside the reference. Without a PACKAGE: all. Exit code 1 if something installed is broken.
    """
    from mambadsl.parts.registry import packages
    from mambadsl.text.spell import nearest

    for name in names:
        if name not in packages():
            near = nearest(name, packages())
            meant = f"did you mean `{near}`?" if near else f"there are {', '.join(packages())}"
            raise click.UsageError(f"there is no package of parts `{name}`; {meant}")
    from mambadsl.run.doctor.report import examine, report_data
    from mambadsl.run.doctor.text import report_text

    # Kernels take a while to compile: people see what is going on, files do not.
    tell = output.note if sys.stderr.isatty() else lambda words: None
    report = examine(names, quick=quick, tell=tell)
    if as_json:
        output.json(**{"ok": report.ok, **report_data(report)})
    else:
        output.text(report_text(report))
    return 0 if report.ok else 1
