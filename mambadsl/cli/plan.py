"""`mambadsl plan`: which layers run in which pipeline stage, and what that costs."""

from __future__ import annotations

from typing import Any

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.planning import plans
from mambadsl.cli.source import Given, takes_model


@command(
    "plan",
    examples=(
        "mambadsl plan models/nemotron_h_8b.mdl --stages 8",
        "mambadsl plan models/nemotron_h_8b.mdl --stages 4 --schedule zbv --microbatches 16 --device h100",
        "mambadsl plan models/tiny.mdl --stages 2 --memory 1GiB --length 128 --batch 4",
    ),
)
@takes_model
@plans
def run(model: Given, how: dict[str, Any], as_json: bool) -> None:
    """Cut a model into pipeline stages.

    The cuts are those with the shortest predicted step that fit into memory. Without --stages, the text's `|`
    marks say how many; they are kept.
    """
    program = model.program()
    plan = program.plan(**how)
    if as_json:
        output.json(name=program.spec.name, plan=plan.to_json(), diagnostics=output.plain(program.diagnostics))
    else:
        from mambadsl.show.plan import plan_text

        output.problems(program.diagnostics)
        output.text(plan_text(plan))
