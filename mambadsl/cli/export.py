"""`mambadsl export`: a model and its weights for another library."""

from __future__ import annotations

from pathlib import Path

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, takes_model


@command(
    "export",
    examples=(
        "mambadsl export hf models/lfm2_350m.mdl -o build/lfm2_350m",
        "mambadsl export hf models/nemotron_h_8b.mdl -o build/nemotron_h_8b --family nemotron_h",
    ),
)
@click.argument("form", metavar="FORM", type=click.Choice(("hf",)))
@takes_model
@click.option(
    "-o", "--output", "target", type=click.Path(path_type=Path), metavar="FOLDER", required=True, help="Write it here."
)
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="A checkpoint of the model.")
@click.option("--family", metavar="NAME", help="The model_type to export as (default: one that fits).")
def run(
    model: Given, form: str, target: Path, weights: Path | None, family: str | None, as_json: bool
) -> None:
    """Make a folder that Hugging Face's transformers loads.

    As the family that computes what the model computes; if there is none, the layers that stand in the way are
    named. Without --weights, config.json alone is written.
    """
    from mambadsl.hf.folder import export_hf

    found = export_hf(model.program(), target, weights=weights, family=family)
    written = [str(path) for path in found.files]
    if as_json:
        output.json(family=found.family, unchanged=found.unchanged, files=written)
        return
    output.text(f"{model.name} is a `{found.family}`")
    if weights is None:
        output.note("no --weights: the configuration alone was written")
    for path in written:
        output.text(f"wrote {path}")
