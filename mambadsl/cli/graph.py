"""`mambadsl graph`: pictures of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.planning import plans
from mambadsl.cli.source import Given, takes_model

#: By name: the module of `show` and its function.
_FORMS = {
    "text": ("tree", "tree_text"),
    "dot": ("dot", "dot_text"),
    "mermaid": ("mermaid", "mermaid_text"),
    "svg": ("svg", "svg_text"),
    "explorer": ("explorer", "explorer_text"),
}


@command(
    "graph",
    examples=(
        "mambadsl graph models/tiny.mdl",
        "mambadsl graph models/nemotron_h_8b.mdl --as svg --stages 4 -o nemotron.svg",
        "mambadsl graph models/falcon_h1_0_5b.mdl --as mermaid",
        'mambadsl graph -e "[M F]*3 A F" --as dot',
    ),
)
@takes_model
@click.option(
    "--as",
    "form",
    type=click.Choice(tuple(_FORMS)),
    default="text",
    help="text: a tree. dot: Graphviz. explorer: JSON for Google's Model Explorer.",
)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write it here.")
@plans
def run(model: Given, form: str, out: Path | None, how: dict[str, Any], as_json: bool) -> None:
    """Draw a model: text tree, DOT, Mermaid, SVG, Model Explorer.

    With --stages (or another option of a plan) it is planned, and the stages are shown.
    """
    from importlib import import_module

    program = model.program()
    plan = program.plan(**how) if how else None
    module, function = _FORMS[form]
    picture = getattr(import_module(f"mambadsl.show.{module}"), function)(program.layers, plan=plan)
    if out is not None:
        output.write(out, picture)
    if as_json:
        output.json(name=program.spec.name, form=form, file=str(out) if out else None, text=None if out else picture)
    elif out is None:
        output.text(picture)
