"""`mambadsl plan`: which layers run in which pipeline stage, and what that costs."""

from __future__ import annotations

import os
from errno import EACCES
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.planning import planned_parts, plans
from mambadsl.cli.source import Given, part_set, takes_model
from mambadsl.cli.types import COUNT

if TYPE_CHECKING:
    from mambadsl.compile import Program
    from mambadsl.train.measure import Measurement


@command(
    "plan",
    examples=(
        "mambadsl plan models/nemotron_h_8b.mdl --stages 8",
        "mambadsl plan models/nemotron_h_8b.mdl --stages 4 --schedule zbv --microbatches 16 --device h100",
        "mambadsl plan models/nemotron_h_8b.mdl --stages 4 --parts auto",
        "mambadsl plan models/tiny.mdl --measure build/times.json --device cpu --length 16 --stages 2",
    ),
)
@takes_model
@plans
@click.option("--parts", metavar="SET",
              help="Say as well which part fills each slot: fused, te, auto, ...; of --measure, the set that is timed.")
@click.option("--measure", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json",
              help="Time the layers on this machine's --device (cpu, cuda), write FILE, and plan with it.")
@click.option("--dtype", type=click.Choice(("fp32", "bf16")), help="Layers are timed in (default: bf16 on a GPU).")
@click.option("--compile", is_flag=True, help="They are timed through torch.compile.")
@click.option("--recompute", is_flag=True, help="They are timed as `train --recompute` runs them.")
@click.option("--tensor", type=COUNT, metavar="N", help="They are timed as one of N ranks that share them has them.")
def run(
    model: Given, how: dict[str, Any], parts: str | None, measure: Path | None, as_json: bool, **measuring: Any
) -> None:
    """Cut a model into pipeline stages.

    The cuts are those with the shortest predicted step that fit into memory. Without --stages, the text's `|`
    marks say how many; they are kept.
    """
    program = model.program()
    taken = None
    if measure is not None:
        first = os.environ.get("RANK", "0") == "0"
        taken = _measured(program, measure, how, parts=parts or "auto", quiet=as_json or not first, **measuring)
        if not first:
            return
        output.write(measure, dumps(taken.to_json(), indent=1) + "\n")
        how["device"], parts = str(measure), None
    elif given := [f"--{name}" for name, value in measuring.items() if value]:
        raise click.UsageError(f"{given[0]} is of --measure")
    elif how.get("device", "").startswith("cuda"):
        raise click.UsageError("cuda is of --measure; a plan is for h200, h100, a100 or cpu, or --measured FILE")
    chosen = planned_parts(program, parts, how) if parts is not None else None
    plan = program.plan(**how)
    if as_json:
        from mambadsl.show.parts import assignment_data

        table = {"assignment": assignment_data(chosen[0])} if chosen else {}
        doubts = output.plain(program.diagnostics)
        if taken:
            table["measured"] = taken.to_json()
        output.json(name=program.spec.name, plan=plan.to_json(), **table, diagnostics=doubts)
        return
    from mambadsl.show.plan import plan_text

    if taken:
        from mambadsl.train.tables import measurement_text

        output.text(f"{measurement_text(taken)}{measure} has the times: `--measured`, `train --plan-device`\n")

    output.problems(program.diagnostics)
    output.text(plan_text(plan))
    if chosen:
        from mambadsl.show.parts import assignment_text

        output.text("\n" + assignment_text(program.spec.name, chosen[0], where=chosen[1]))


def _measured(
    program: Program, path: Path, how: dict[str, Any], *, parts: str, dtype: str | None, compile: bool, recompute: bool,
    tensor: int | None, quiet: bool,
) -> Measurement:
    """What this machine's device takes for the layers; under torchrun, on every process."""
    if path.suffix != ".json":
        raise click.BadParameter(f"`{path}` is not a .json file", param_hint="--measure")
    given = how.get("device", "")
    if given.endswith(".json"):
        raise click.UsageError("--measure writes times, --measured reads them: give one of the two")
    part_set(parts, program)
    try:
        from mambadsl.build.device import usual
        from mambadsl.train.measure import measure
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise click.ClickException("--measure needs PyTorch: pip install 'mambadsl[torch]'") from None

    device = given or usual()
    if device != "cpu" and not device.startswith("cuda"):
        raise click.UsageError(f"--measure times this machine: --device cpu or cuda, not {device}")
    if "stages" in how:
        # What no times can make right is said before they are taken.
        program.plan(**{**how, "device": "cpu", "memory_limit": 2**63})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES))
    except OSError as error:
        raise click.ClickException(f"`{path}` cannot be written: {error.strerror or error}") from None
    try:
        return measure(
            program.layers, device=device, dtype=dtype or ("fp32" if device == "cpu" else "bf16"), parts=parts,
            length=how.get("length"), sequences=how.get("sequences", 1), compile=compile, recompute=recompute,
            tensor=tensor or 1, tell=(lambda words: None) if quiet else output.note,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
