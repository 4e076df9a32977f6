"""`mambadsl verify`: a model beside the same one in another library, layer by layer."""

from __future__ import annotations

from pathlib import Path

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, takes_model
from mambadsl.cli.types import COUNT


@command(
    "verify",
    examples=(
        "mambadsl verify docs/tiny_qwen3_next/model.mdl --against hf docs/tiny_qwen3_next",
        "mambadsl verify docs/tiny_qwen3_next/model.mdl --against hf docs/tiny_qwen3_next --length 200 --json",
    ),
)
@takes_model
@click.option(
    "--against", nargs=2, type=(click.Choice(("hf",)), click.Path()), required=True, metavar="FORM FOLDER",
    help="hf FOLDER: Hugging Face's model in a folder.",
)
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="A checkpoint (default: FOLDER's).")
@click.option("--length", type=COUNT, default=48, show_default=True, metavar="N", help="Tokens of each of two rows.")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the tokens.")
def run(
    model: Given, against: tuple[str, str], weights: Path | None, length: int, seed: int, as_json: bool
) -> int:
    """Hold a model to another library's, side by side.

    Both get the same weights and tokens, in float32 on the CPU; the residual stream is compared after each of their
    layers, and the logits at the end. A FOLDER without tensors gives both the same random ones. Exit code 1 if the
    logits differ by more than rounding does; the first layer that differs is named.
    """
    from mambadsl.hf.verify import TOLERANCE, verify_hf

    program = model.program()
    if length > program.layers.model.context:
        raise click.BadParameter(f"at most {program.layers.model.context}, the model's context", param_hint="--length")
    found = verify_hf(program, against[1], weights=weights, length=length, seed=seed)
    if as_json:
        rows = [{"at": r.at, "theirs": r.theirs, "difference": r.difference, "same": r.same} for r in found.rows]
        output.json(
            ok=found.same, rows=rows, random=found.random, notes=list(found.notes), tolerance=TOLERANCE,
            first=found.first.at if found.first else None,
        )
        return 0 if found.same else 1
    for note in found.notes:
        output.note(note)
    if found.random:
        output.note(f"no tensors in {against[1]}: both have the same random ones")
    width = max(len(row.at) for row in found.rows)
    theirs = max(len(row.theirs) for row in found.rows)
    for row in found.rows:
        mark = "" if row.same else "  differs"
        output.text(f"{row.at:{width}}  {row.theirs:{theirs}}  {row.difference:.1e}{mark}")
    if found.same:
        output.text(f"the same, within rounding (largest difference over root mean square at most {TOLERANCE:g})")
    elif found.first is not found.rows[-1]:
        output.text(f"the first that differs is {found.first.at} ({found.first.theirs})")
    else:
        output.text("every layer is the same; the final norm or the head differs")
    return 0 if found.same else 1
