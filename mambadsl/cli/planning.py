"""The options of a plan, for the commands that make one (`how`, the keywords of `Program.plan`), and the table of
parts that some commands print.

Refuses (bad usage) a device and a file of measured times at once, and part sets that do not exist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mambadsl.cli.source import part_set
from mambadsl.cli.types import COUNT, Size, Words

if TYPE_CHECKING:
    from mambadsl.compile import Program
    from mambadsl.plan.assign import Assignment


def _schedules() -> tuple[str, ...]:
    from mambadsl.plan.schedule import SCHEDULES

    return tuple(SCHEDULES)


def _devices() -> tuple[str, ...]:
    from mambadsl.plan.device import DEVICES

    return tuple(DEVICES)


def _here(word: str) -> bool:
    """A device of this machine, which is measured, not planned for."""
    return word.split(":")[0] == "cuda"


#: By keyword: (flags, type, metavar, help).
_OPTIONS = {
    "stages": ("--stages", COUNT, "N", "Ranks of the pipeline (default: as the text cuts)."),
    "schedule": ("--schedule", Words(_schedules), "NAME", "gpipe, 1f1b (default), interleaved, zb or zbv."),
    "microbatches": ("--microbatches", COUNT, "N", "Of a batch (default: 4 a rank)."),
    "virtual": ("--virtual-stages --virtual", COUNT, "N", "Stages a rank (default: the schedule's least)."),
    "memory_limit": ("--memory", Size(), "SIZE", "Of a rank, as in 80GiB (default: the device's)."),
    "device": ("--device", Words(_devices, also=_here), "NAME", "h200 (default), h100, a100 or cpu."),
    "measured": ("--measured", click.Path(dir_okay=False), "FILE", "A .json file of measured layer times."),
    "length": ("--length", COUNT, "TOKENS", "Of a sequence (default: the model's context)."),
    "sequences": ("--batch", COUNT, "N", "Sequences of a microbatch (default 1)."),
}


def plans(function: Callable) -> Callable:
    """Hands the options over as `how`; what was not given is not in it."""

    @functools.wraps(function)
    def inner(*args: Any, **rest: Any) -> Any:
        how = {name: value for name in _OPTIONS if (value := rest.pop(name)) is not None}
        if measured := how.pop("measured", None):
            if "device" in how:
                raise click.UsageError("--device and --measured do not go together; the file names its base device")
            if not measured.endswith(".json"):
                raise click.BadParameter(f"`{measured}` is not a .json file", param_hint="--measured")
            how["device"] = measured
        return function(*args, how=how, **rest)

    for name, (flags, type, metavar, help) in reversed(_OPTIONS.items()):
        inner = click.option(*flags.split(), name, type=type, metavar=metavar, help=help)(inner)
    return inner


def assignment(program: Program, parts: str, *, device: str | None, dtype: str) -> tuple[Assignment, str]:
    """Which part fills each slot, and the machine in words. device: "cuda" or "cpu"; None or what this machine has:
    this machine, else one with every package. Raises MdlError (E902, E907)."""
    from mambadsl.parts.machine import Machine
    from mambadsl.plan.assign import assign
    from mambadsl.run.doctor.environment import this_machine

    part_set(parts, program)
    try:
        here = this_machine()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    if device in (None, here.device):
        where = f"this machine, {here.name or 'without a GPU'}"
    else:
        here = Machine(device, missing=lambda package: None)
        where = f"a machine with {'an NVIDIA GPU' if device == 'cuda' else 'no GPU'} and every package"
    return assign(program.layers, parts=parts, machine=here, dtype=dtype), where


def planned_parts(program: Program, parts: str, how: dict[str, Any]) -> tuple[Assignment, str]:
    """The same for the device that is planned for, in bfloat16."""
    device = "cpu" if how.get("device") == "cpu" else "cuda"
    return assignment(program, parts, device=device, dtype="bf16")
