"""`mambadsl expand`: a model with every default written out."""

from __future__ import annotations

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, takes_model


@command(
    "expand",
    examples=(
        "mambadsl expand models/tiny.mdl",
        "mambadsl expand models/tiny.mdl --origin",
        'mambadsl expand -e "M M M A" --set d_model=512',
    ),
)
@takes_model
@click.option("--origin", is_flag=True, help="Say behind each value where it came from.")
def run(model: Given, origin: bool, as_json: bool) -> None:
    """Write a model out in full.

    With every default, and every name looked up. The result is a model file that compiles to the same model.
    """
    program = model.program()
    text = program.expand(origin=origin)
    if as_json:
        output.json(name=program.spec.name, text=text)
    else:
        output.text(text)
