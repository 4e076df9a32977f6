"""`mambadsl plan`: which layers run in which pipeline stage, and what that costs."""

from __future__ import annotations

from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, takes_model
from mambadsl.cli.types import COUNT, Size, Words


def _schedules() -> tuple[str, ...]:
    from mambadsl.plan.schedule import SCHEDULES

    return tuple(SCHEDULES)


def _devices() -> tuple[str, ...]:
    from mambadsl.plan.device import DEVICES

    return tuple(DEVICES)


@command(
    "plan",
    examples=(
        "mambadsl plan models/nemotron_h_8b.mdl --stages 8",
        "mambadsl plan models/nemotron_h_8b.mdl --stages 4 --schedule zbv --microbatches 16 --device h100",
        "mambadsl plan models/tiny.mdl --stages 2 --memory 1GiB --length 128 --batch 4",
    ),
)
@takes_model
@click.option("--stages", type=COUNT, metavar="N", help="Ranks of the pipeline (default: as the text cuts).")
@click.option(
    "--schedule",
    type=Words(_schedules),
    default="1f1b",
    metavar="NAME",
    help="gpipe, 1f1b (default), interleaved, zb or zbv.",
)
@click.option("--microbatches", type=COUNT, metavar="N", help="Of a batch (default: 4 a rank).")
@click.option("--virtual", type=COUNT, metavar="N", help="Stages a rank (default: the schedule's least).")
@click.option(
    "--memory", "memory_limit", type=Size(), metavar="SIZE", help="Of a rank, as in 80GiB (default: the device's)."
)
@click.option("--device", type=Words(_devices), metavar="NAME", help="h200 (default), h100, a100 or cpu.")
@click.option(
    "--measured", type=click.Path(dir_okay=False), metavar="FILE", help="A .json file of measured layer times."
)
@click.option("--length", type=COUNT, metavar="TOKENS", help="Of a sequence (default: the model's context).")
@click.option("--batch", "sequences", type=COUNT, default=1, metavar="N", help="Sequences of a microbatch (default 1).")
def run(model: Given, device: str | None, measured: str | None, as_json: bool, **how: Any) -> None:
    """Cut a model into pipeline stages.

    The cuts are those with the shortest predicted step that fit into memory. Without --stages, the text's `|`
    marks say how many; they are kept.
    """
    if device and measured:
        raise click.UsageError("--device and --measured do not go together; the file names its base device")
    if measured and not measured.endswith(".json"):
        raise click.BadParameter(f"`{measured}` is not a .json file", param_hint="--measured")
    program = model.program()
    plan = program.plan(device=measured or device or "h200", **how)
    if as_json:
        output.json(name=program.spec.name, plan=plan.to_json(), diagnostics=output.plain(program.diagnostics))
    else:
        from mambadsl.show.plan import plan_text

        output.problems(program.diagnostics)
        output.text(plan_text(plan))
