"""`mambadsl plan`: which layers run in which pipeline stage, and what that costs."""

from __future__ import annotations

from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.planning import planned_parts, plans
from mambadsl.cli.source import Given, takes_model


@command(
    "plan",
    examples=(
        "mambadsl plan models/nemotron_h_8b.mdl --stages 8",
        "mambadsl plan models/nemotron_h_8b.mdl --stages 4 --schedule zbv --microbatches 16 --device h100",
        "mambadsl plan models/tiny.mdl --stages 2 --memory 1GiB --length 128 --batch 4",
        "mambadsl plan models/nemotron_h_8b.mdl --stages 4 --parts auto",
    ),
)
@takes_model
@plans
@click.option("--parts", metavar="SET", help="Say as well which part fills each slot: fused, te, auto, ...")
def run(model: Given, how: dict[str, Any], parts: str | None, as_json: bool) -> None:
    """Cut a model into pipeline stages.

    The cuts are those with the shortest predicted step that fit into memory. Without --stages, the text's `|`
    marks say how many; they are kept.
    """
    program = model.program()
    chosen = planned_parts(program, parts, how) if parts is not None else None
    plan = program.plan(**how)
    if as_json:
        from mambadsl.show.parts import assignment_data

        table = {"assignment": assignment_data(chosen[0])} if chosen else {}
        doubts = output.plain(program.diagnostics)
        output.json(name=program.spec.name, plan=plan.to_json(), **table, diagnostics=doubts)
        return
    from mambadsl.show.plan import plan_text

    output.problems(program.diagnostics)
    output.text(plan_text(plan))
    if chosen:
        from mambadsl.show.parts import assignment_text

        output.text("\n" + assignment_text(program.spec.name, chosen[0], where=chosen[1]))
