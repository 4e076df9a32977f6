"""`mambadsl compile`: checks, plans, and writes what a run needs into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.planning import planned_parts, plans
from mambadsl.cli.source import Given, takes_model


@command(
    "compile",
    examples=(
        "mambadsl compile models/tiny.mdl -o tiny_compiled",
        "mambadsl compile models/nemotron_h_8b.mdl --stages 4 -o nemotron_compiled",
        "mambadsl compile models/jamba_v0_1.mdl --stages 16 --length 4096 -o jamba_compiled",
        'mambadsl compile -e "[M F]*6 A F" --set d_model=512',
    ),
)
@takes_model
@plans
@click.option(
    "--parts", default="reference", show_default=True, metavar="SET", help="The part set that will run it."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write graph.json, plan.json and summary.txt here.",
)
def run(model: Given, how: dict[str, Any], parts: str, out: Path | None, as_json: bool) -> None:
    """Check and plan a model, and write the result into a folder.

    The folder needs no model file any more: `mambadsl.load_compiled(DIR)` builds the model, or any stage of
    it. The same input gives the same bytes.
    """
    program = model.program()
    chosen, where = planned_parts(program, parts, how)
    plan = program.plan(**how)
    paths = ()
    if out is not None:
        from mambadsl.run.compiled import save

        try:
            paths = save(program, plan, out, parts=parts)
        except OSError as error:
            where = error.filename or out
            raise click.ClickException(f"`{where}` cannot be written: {error.strerror or error}") from None
    from mambadsl.show.parts import assignment_data, assignment_text

    if as_json:
        written, doubts = [str(path) for path in paths], output.plain(program.diagnostics)
        table = assignment_data(chosen)
        output.json(
            name=program.spec.name, files=written, plan=plan.to_json(), assignment=table, diagnostics=doubts
        )
        return
    from mambadsl.show.plan import plan_text

    output.problems(program.diagnostics)
    output.text(plan_text(plan))
    if parts != "reference":
        output.text("\n" + assignment_text(program.spec.name, chosen, where=where))
    for path in paths:
        output.text(f"wrote {path}")
