"""`mambadsl summary`: a model as a table of layers and costs."""

from __future__ import annotations

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, takes_model
from mambadsl.cli.types import COUNT


@command(
    "summary",
    examples=(
        "mambadsl summary models/nemotron_h_8b.mdl",
        "mambadsl summary models/tiny.mdl --all --length 1024",
        'mambadsl summary -e "[M F]*12 A F" --set d_model=2048 --json',
    ),
)
@takes_model
@click.option("--all", "every", is_flag=True, help="A row for every layer, nothing folded.")
@click.option("--length", type=COUNT, metavar="TOKENS", help="Of a sequence (default: the model's context).")
def run(model: Given, every: bool, length: int | None, as_json: bool) -> None:
    """Show layers and what they cost as a table.

    Parameters, FLOPs, keys and values, fixed decoding state. Repeats are folded as the file groups them; a
    shared weight counts once.
    """
    from mambadsl.show.summary import summary_data, summary_text

    graph = model.program().layers
    if as_json:
        output.json(**summary_data(graph, length=length, folded=not every))
    else:
        output.text(summary_text(graph, length=length, folded=not every))
