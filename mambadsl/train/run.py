"""`mambadsl train` without the command line: opens the world, the data and the plan, and runs.

Refuses (ValueError, MdlError) what its parts refuse, before weights are allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mambadsl.build.device import device as usable
from mambadsl.compile import Program
from mambadsl.data.corpus import open_corpus
from mambadsl.data.rows import Rows
from mambadsl.plan.plan import Plan
from mambadsl.train.failure import Alone
from mambadsl.train.loop import Keeping, Result, Run
from mambadsl.train.save import held
from mambadsl.train.settings import Settings
from mambadsl.train.stop import Stop
from mambadsl.train.world import opened, shape


def train(
    program: Program, data: Sequence[str | Path], folder: str | Path, settings: Settings, *, device: Any = "cpu",
    tokenizer: str | Path | None = None, held_out: float = 0.0, keeping: Keeping = Keeping(),
    planned: dict[str, Any] | None = None, weights: str | Path | None = None,
) -> Result:
    """Trains a model, or goes on with the run that is in the folder.

    planned: keywords of the planner beside those that the settings have (`device`, `memory_limit`). weights: a folder
    of safetensors that a new run begins with.
    """
    place = usable(device)
    _, ranks, _ = shape(stages=settings.stages, tensor=settings.tensor)
    settings.rows(ranks)
    plan = planning(program, settings, **(planned or {})) if settings.stages > 1 else None
    folder, weights = Path(folder), None if weights is None else Path(weights)
    with opened(place, stages=settings.stages, tensor=settings.tensor) as world, ExitStack() as stack:
        with world.agreed():
            if world.first:
                stack.enter_context(held(folder))
        with world.agreed():
            corpus = open_corpus(data, vocab=program.spec.settings.vocab, tokenizer=tokenizer)
            rows = Rows(corpus, length=settings.length, seed=settings.seed, held_out=held_out)
        try:
            run = Run(
                program.layers, rows, settings, folder, world=world, plan=plan, keeping=keeping, weights=weights
            )
            with Stop() as stop:
                return run.train(stop)
        except torch.OutOfMemoryError as error:
            less = "a smaller microbatch, recompute or more ranks need less"
            raise Alone(f"rank {world.rank}: the memory of {world.device} is full; {less} ({error})") from None


def planning(program: Program, settings: Settings, **how: Any) -> Plan:
    """The pipeline's plan for these settings; the same on every rank."""
    _, data, _ = shape(stages=settings.stages, tensor=settings.tensor)
    each, micro = settings.rows(data)
    return program.plan(
        stages=settings.stages, schedule=settings.pipeline, virtual=settings.virtual, microbatches=each // micro,
        length=settings.length, sequences=micro, **how,
    )
