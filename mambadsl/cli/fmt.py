"""`mambadsl fmt`: the one way to lay a model file out."""

from __future__ import annotations

from pathlib import Path

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given


@command(
    "fmt",
    examples=(
        "mambadsl fmt models/tiny.mdl",
        "mambadsl fmt --check models/*.mdl",
        "echo 'M   M A' | mambadsl fmt -",
    ),
)
@click.argument("files", nargs=-1, metavar="FILE...", type=click.Path(allow_dash=True))
@click.option("-e", "--expression", metavar="TEXT", help="The text itself; prints the result.")
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if a file would change.")
@click.option("--stdout", is_flag=True, help="Print the result, change nothing.")
def run(files: tuple[str, ...], expression: str | None, check: bool, stdout: bool, as_json: bool) -> int:
    """Format files in place. There are no options of style.

    Standard input (`-`) and -e are printed. Comments and line breaks inside patterns stay.
    """
    from mambadsl.syntax.read import read
    from mambadsl.syntax.write import write
    from mambadsl.text.diagnostic import Diagnostic, MdlError

    if bool(files) == (expression is not None):
        raise click.UsageError("give FILEs or -e TEXT, and not both")
    if check and stdout:
        raise click.UsageError("--check and --stdout do not go together")
    models = (
        [Given(None, expression, {})]
        if expression is not None
        else [Given(file, None, {}) for file in dict.fromkeys(files)]
    )
    rows: list[dict] = []
    failures: list[Diagnostic] = []
    for model in models:
        try:
            source = model.source()
            text = write(read(source))
        except MdlError as error:
            failures += error.diagnostics
            continue
        raw = source.path.read_bytes().decode("utf-8") if source.path is not None else source.text
        if model.text is not None and not raw.endswith("\n"):
            # An argument of a command line has no last line end.
            raw += "\n"
        rows.append({"file": model.name, "changed": text != raw, "text": text})
        printed = stdout or source.path is None
        if not check and not printed and text != raw:
            output.write(Path(source.path), text)
        if not as_json:
            if printed and not check:
                output.text(text)
            elif text != raw:
                output.text(f"{model.name}: {'would change' if check else 'formatted'}")
    changed = any(row["changed"] for row in rows)
    fine = not failures and not (check and changed)
    if as_json:
        output.json(ok=fine, files=rows, diagnostics=output.plain(failures))
    else:
        output.problems(failures)
    return 0 if fine else 1
