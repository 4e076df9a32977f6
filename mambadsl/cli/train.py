"""`mambadsl train`: a model, data and a folder; alone, or under torchrun as one of many processes."""

from __future__ import annotations

import functools
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambadsl.cli import output
from mambadsl.cli.command import command
from mambadsl.cli.source import Given, part_set, takes_model
from mambadsl.cli.types import COUNT, Place, Size, Words

if TYPE_CHECKING:
    from mambadsl.compile import Program
    from mambadsl.data.rows import Rows
    from mambadsl.train.loop import Result
    from mambadsl.train.settings import Settings

_NUMBER = click.IntRange(min=0)


def _schedules() -> tuple[str, ...]:
    from mambadsl.train.schedule import SCHEDULES

    return tuple(SCHEDULES)


def _gathers() -> tuple[str, ...]:
    from mambadsl.train.settings import GATHER

    return GATHER


def _pipelines() -> tuple[str, ...]:
    from mambadsl.plan.schedule import SCHEDULES

    return tuple(SCHEDULES)


def _speaks() -> bool:
    """Whether this process tells what is wrong: of each machine's, the first. One that is not of several does."""
    several = os.environ.get("RANK") and os.environ.get("WORLD_SIZE")
    return not several or os.environ.get("LOCAL_RANK", "0") == "0"


def _told_once(function: Callable) -> Callable:
    """Processes that refuse refuse alike: one tells why, the others end with the same code."""

    @functools.wraps(function)
    def inner(*args: Any, **rest: Any) -> int | None:
        from mambadsl.text.diagnostic import MdlError

        try:
            return function(*args, **rest)
        except (MdlError, click.ClickException) as error:
            if _speaks():
                raise
            return getattr(error, "exit_code", 1)

    return inner


def _devices() -> tuple[str, ...]:
    from mambadsl.plan.device import DEVICES

    return tuple(DEVICES)


def _dry_run(
    program: Program, settings: Settings, planned: dict[str, Any], ranks: int | None, rows: Rows, *, fused: bool,
    as_json: bool,
) -> int:
    from mambadsl.train.loop import beforehand
    from mambadsl.train.run import expected, gathering, planning
    from mambadsl.train.tables import forecast_text

    settings = gathering(program, settings, ranks=ranks, fused=fused, **planned)
    plan = planning(program, settings, ranks=ranks, **planned) if settings.stages > 1 else None
    will = expected(program, settings, plan=plan, ranks=ranks, fused=fused, **planned)
    if os.environ.get("RANK", "0") != "0":
        return 1 if will.too_large else 0
    facts = dict(rows=rows.count, corpus_tokens=len(rows.corpus.tokens), held_out_rows=rows.held_out_count)
    notes = beforehand(program.layers, rows, settings, will)
    if as_json:
        epochs = settings.steps * settings.batch / rows.count
        output.json(
            ok=not will.too_large, **facts, steps=settings.steps, epochs=epochs, forecast=will.to_json(),
            plan=plan and plan.to_json(), notes=notes,
        )
    else:
        output.text(forecast_text(will, settings, notes=notes, **facts))
    return 1 if will.too_large else 0


@command(
    "train",
    examples=(
        "mambadsl train models/tiny.mdl --data docs/language.md --length 64 --batch 4 --steps 2 -o build/run",
        "mambadsl train models/tiny.mdl --data docs/language.md --stages 2 --plan-device h200 --dry-run --ranks 4",
        "mambadsl train models/tiny.mdl --data models --length 64 --batch 4 --steps 2 --schedule wsd --held-out 0.05",
    ),
)
@_told_once
@takes_model
@click.option("--data", type=Place(), multiple=True, required=True, metavar="PATH",
              help="Text, .jsonl, .bin/.idx, .npy, or a folder of them; repeatable.")
@click.option("--tokenizer", type=Place(dir_okay=False), metavar="FILE", help="A tokenizer.json (default: bytes).")
@click.option("--eod", default="auto", show_default=True, metavar="TOKEN|ID",
              help="After each document of text: a token, an id, none; auto: the tokenizer's end of text, if any.")
@click.option(
    "-o", "--output", "folder", type=Place(path_type=Path, file_okay=False), metavar="DIR",
    help="Of the run: its log and saves; one that is there goes on (default: runs/NAME).",
)
@click.option("--weights", type=Place(path_type=Path), metavar="DIR", help="Begin with these, not random ones.")
@click.option("--length", type=COUNT, metavar="TOKENS", help="Of a row (default: the model's context).")
@click.option("--batch", type=COUNT, default=8, show_default=True, metavar="ROWS", help="Of a step, over all ranks.")
@click.option("--microbatch", type=COUNT, metavar="ROWS",
              help="That a rank computes at once (default: all its rows of a step; in a pipeline 1).")
@click.option("--steps", type=COUNT, default=1000, show_default=True, metavar="N", help="Of the whole run.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True, metavar="RATE")
@click.option("--warmup", type=_NUMBER, default=0, show_default=True, metavar="STEPS", help="Up to the rate.")
@click.option("--schedule", type=Words(_schedules), default="cosine", show_default=True, metavar="NAME",
              help="How the rate falls: cosine, wsd, linear or constant.")
@click.option("--decay", type=click.FloatRange(0, 1, min_open=True), default=0.2, show_default=True, metavar="SHARE",
              help="Of the steps after the warm-up, in which wsd falls.")
@click.option("--floor", type=click.FloatRange(0, 1), default=0.1, show_default=True, metavar="SHARE",
              help="Of the rate that is left at the end.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.1, show_default=True, metavar="RATE",
              help="Of the weights that decay (matrices; `explain KIND` tells).")
@click.option("--betas", type=click.FloatRange(0, 1, max_open=True), nargs=2, default=(0.9, 0.95), show_default=True,
              metavar="B1 B2", help="Of AdamW's two means.")
@click.option("--eps", type=click.FloatRange(0, min_open=True), default=1e-8, show_default=True, metavar="EPS",
              help="Of AdamW.")
@click.option("--clip", type=click.FloatRange(0), default=1.0, show_default=True, metavar="NORM",
              help="Of all gradients together; 0 for none.")
@click.option("--seed", type=_NUMBER, default=0, show_default=True, metavar="N", help="Of weights, order, dropout.")
@click.option("--held-out", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True,
              metavar="SHARE", help="Of the rows, at the data's end, only measured.")
@click.option("--held-out-every", type=_NUMBER, default=500, show_default=True, metavar="STEPS",
              help="0: only at the end.")
@click.option("--save-every", type=_NUMBER, default=500, show_default=True, metavar="STEPS",
              help="0: only at the end.")
@click.option("--keep", type=_NUMBER, default=2, show_default=True, metavar="N",
              help="Saves that are left; 0: none is made.")
@click.option("--dtype", type=click.Choice(("fp32", "bf16")), help="Layers compute in (default: bf16 on a GPU).")
@click.option("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one).")
@click.option("--parts", default="auto", show_default=True, metavar="SET", help="The part set that runs it.")
@click.option("--compile", is_flag=True, help="Each layer through torch.compile.")
@click.option("--recompute", is_flag=True, help="Every layer again in the backward pass, for memory.")
@click.option("--gather", type=Words(_gathers), default="auto", show_default=True, metavar="HOW",
              help="When data ranks gather weights: all, once a step; layers, for each pass, for memory; auto: all if "
                   "there is room.")
@click.option("--stages", type=COUNT, default=1, show_default=True, metavar="N", help="Ranks of the pipeline.")
@click.option("--pipeline", type=Words(_pipelines), default="1f1b", show_default=True, metavar="NAME",
              help="Its schedule: gpipe, 1f1b, interleaved, zb or zbv.")
@click.option("--virtual-stages", "--virtual", "virtual", type=COUNT, metavar="N",
              help="Stages a rank (default: the schedule's least). torchrun takes the short name for one of its own.")
@click.option("--tensor", type=COUNT, default=1, show_default=True, metavar="N", help="Ranks that share each layer.")
@click.option("--plan-device", metavar="NAME|FILE",
              help="The planner's: h200 (default on a GPU), ..., or a file of `plan --measure`.")
@click.option("--memory", "memory_limit", type=Size(), metavar="SIZE", help="Of a rank (default: the device's).")
@click.option("--dry-run", is_flag=True, help="Say what each rank would hold and take; train nothing.")
@click.option("--ranks", type=COUNT, metavar="N", help="Of the dry run (default: those that there are).")
@click.option("--tensorboard", is_flag=True, help="Write for TensorBoard too.")
def run(
    model: Given, data: tuple[str, ...], tokenizer: str | None, eod: str, folder: Path | None,
    weights: Path | None, length: int | None,
    held_out: float, held_out_every: int, save_every: int, keep: int, dtype: str | None, device: str | None,
    clip: float, plan_device: str | None, memory_limit: int | None, tensorboard: bool, as_json: bool,
    dry_run: bool, ranks: int | None, **how: Any,
) -> int | None:
    """Train a model, or go on with a run that was stopped.

    Under torchrun, ranks that are not stages or tensor ranks share the rows: `torchrun --nproc-per-node 4 -m mambadsl
    train ...`.

    Ctrl-C, SIGTERM and SIGHUP end it after the step that is being done, saved, with exit code 130, 143 and 129; a
    second Ctrl-C ends it at once. Whatever ended it, the same command goes on from the last save.
    """
    _paths(data)
    program = model.program()
    part_set(how["parts"], program)
    if ranks is not None and not dry_run:
        raise click.UsageError("--ranks is of --dry-run: a run has those that torchrun starts")
    try:
        from mambadsl.build.checkpoint import stored_weights
        from mambadsl.build.device import usual
        from mambadsl.train.failure import Alone, NotFinite
        from mambadsl.train.loop import Keeping
        from mambadsl.train.run import rows, train
        from mambadsl.train.settings import Settings
        from mambadsl.train.world import lost
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise click.ClickException("train needs PyTorch: pip install 'mambadsl[torch]'") from None

    # A dry run for another machine needs none of it.
    elsewhere = dry_run and plan_device in _devices() and plan_device != "cpu"
    device = device or ("cuda" if elsewhere else usual())
    place = device.split(":")[0]
    if place not in ("cpu", "cuda") and (dry_run or place in _devices()):
        planned_for = f"; --plan-device {place} plans for one" if place in _devices() else ""
        raise click.UsageError(f"training runs on cpu or cuda, not on `{place}`{planned_for}")
    try:
        settings = Settings(
            length=length or program.spec.settings.context, dtype=dtype or ("fp32" if place == "cpu" else "bf16"),
            clip=clip or None, **how,
        )
        keeping = Keeping(save_every, keep, held_out_every, tensorboard, quiet=as_json)
        planned = {"device": plan_device or ("cpu" if place == "cpu" else "h200")}
        if memory_limit is not None:
            planned["memory_limit"] = memory_limit
        folder = folder or Path("runs") / program.spec.name
        text = dict(tokenizer=tokenizer, eod=None if eod == "none" else int(eod) if eod.isdecimal() else eod)
        if dry_run:
            found = rows(program, data, settings, held_out=held_out, **text)
            if weights is not None:
                stored_weights(program.layers, weights)
            return _dry_run(program, settings, planned, ranks, found, fused=place != "cpu", as_json=as_json)
        done = train(
            program, data, folder, settings, device=device, held_out=held_out, keeping=keeping, planned=planned,
            weights=weights, **text,
        )
    except NotFinite as error:
        raise click.ClickException(str(error)) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except Alone as error:
        output.note(str(error))
        return 1
    except RuntimeError as error:
        if (why := lost(error)) is None:
            raise
        raise click.ClickException(f"{why}; started again, the run goes on from its last save") from None
    except KeyboardInterrupt:
        # A save that is being written would be waited for; what is there of it is taken away at the next start.
        output.note("ended at once")
        os._exit(128 + signal.SIGINT)
    if os.environ.get("RANK", "0") == "0" and done.ended != "SIGHUP":
        _tell(done, settings.steps, folder, saves=keep, as_json=as_json)
    if done.unsaved:
        return 1
    return None if done.ended == "done" else 128 + signal.Signals[done.ended]


def _paths(data: tuple[str, ...]) -> None:
    given: set[Path] = set()
    for path in map(Path, data):
        if path.resolve() in given:
            raise click.UsageError(f"--data `{path}` is given twice")
        given.add(path.resolve())


def _tell(done: Result, steps: int, folder: Path, *, saves: int, as_json: bool) -> None:
    if as_json:
        output.json(ok=done.unsaved is None, folder=str(folder), **done.to_json())
        return
    if done.ended == "done":
        what = f"done: {done.step:,} step{'s' * (done.step > 1)}"
        then = f"`mambadsl export run {shlex.quote(str(folder))} -o DIR` writes the weights"
    else:
        what, then = f"stopped by {done.ended} at step {done.step:,} of {steps:,}", "the same command goes on"
    if not saves:
        then = "nothing was saved (--keep 0)"
    elif done.unsaved:
        then = "not saved: the same command does again what came after the last save"
    output.text(f"{what}; {then}")
