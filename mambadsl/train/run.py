"""`mambadsl train` without the command line: opens the world, the data and the plan, and runs.

Refuses (ValueError, MdlError) what its parts refuse, before weights are allocated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mambadsl.build.device import device as usable
from mambadsl.compile import Program
from mambadsl.data.corpus import open_corpus
from mambadsl.data.encode import AUTO, End
from mambadsl.data.files import apart
from mambadsl.data.rows import Rows
from mambadsl.plan import device as devices
from mambadsl.plan.plan import Plan, plan_units
from mambadsl.train.failure import Alone
from mambadsl.train.forecast import Forecast, chain, forecast
from mambadsl.train.loop import Keeping, Result, Run
from mambadsl.train.memory import full
from mambadsl.train.save import held
from mambadsl.train.settings import Settings
from mambadsl.train.stop import Stop
from mambadsl.train.world import opened, shape


def train(
    program: Program, data: Sequence[str | Path], folder: str | Path, settings: Settings, *, device: Any = "cpu",
    tokenizer: str | Path | None = None, eod: End = AUTO, held_out: float = 0.0, keeping: Keeping = Keeping(),
    planned: dict[str, Any] | None = None, weights: str | Path | None = None,
) -> Result:
    """Trains a model, or goes on with the run that is in the folder.

    planned: keywords of the planner beside those that the settings have (`device`, default by where the run is;
    `memory_limit`). weights: a folder of safetensors that a new run begins with.
    """
    place = usable(device)
    _, ranks, _ = shape(stages=settings.stages, tensor=settings.tensor)
    settings.rows(ranks)
    planned = planned or {"device": "cpu" if place.type == "cpu" else "h200"}
    settings = gathering(program, settings, **planned)
    plan = planning(program, settings, **planned) if settings.stages > 1 else None
    will = expected(program, settings, plan=plan, fused=place.type == "cuda", **planned)
    folder, weights = Path(folder), None if weights is None else Path(weights)
    for path in data:
        apart(Path(path), folder, "run's folder")
    with opened(place, stages=settings.stages, tensor=settings.tensor) as world, ExitStack() as stack:
        with world.agreed():
            if world.first:
                stack.enter_context(held(folder))
        with world.agreed():
            found = rows(program, data, settings, tokenizer=tokenizer, eod=eod, held_out=held_out)
        try:
            run = Run(
                program.layers, found, settings, folder, world=world, plan=plan, keeping=keeping, weights=weights,
                forecast=will,
            )
            with Stop() as stop:
                return run.train(stop)
        except RuntimeError as error:
            if not full(error):
                raise
            less = "a smaller microbatch, recompute or more ranks need less"
            raise Alone(f"rank {world.rank}: the memory of {world.device} is full; {less} ({error})") from None


def rows(
    program: Program, data: Sequence[str | Path], settings: Settings, *, tokenizer: str | Path | None = None,
    eod: End = AUTO, held_out: float = 0.0,
) -> Rows:
    """The data of a run. tokenizer, eod: as `open_corpus` takes them. ValueError where there is nothing to predict."""
    corpus = open_corpus(data, vocab=program.spec.settings.vocab, tokenizer=tokenizer, eod=eod)
    if len(corpus.tokens) == len(corpus.ends):
        raise ValueError("every document of the data has 1 token: none has a next one to predict")
    return Rows(corpus, length=settings.length, seed=settings.seed, held_out=held_out)


def planning(
    program: Program, settings: Settings, *, device: str = "h200", memory_limit: int | None = None,
    ranks: int | None = None,
) -> Plan:
    """The pipeline's plan for these settings; the same on every rank. ValueError for a model that no pipeline takes."""
    if meta := program.spec.settings.meta_tokens:
        raise ValueError(
            f"a pipeline sends tensors of one shape, and with meta_tokens = {meta} rows are longer the more documents "
            "they have: train with --stages 1"
        )
    _, data, _ = shape(stages=settings.stages, tensor=settings.tensor, size=ranks)
    each, micro = settings.rows(data)
    where = devices.device(device)
    return plan_units(
        chain(program.layers, settings, data=data, device=where), stages=settings.stages,
        schedule=settings.pipeline, virtual=settings.virtual, microbatches=each // micro, memory_limit=memory_limit,
        device=where,
    )


def expected(
    program: Program, settings: Settings, *, plan: Plan | None = None, device: str = "h200",
    memory_limit: int | None = None, ranks: int | None = None, fused: bool = True,
) -> Forecast:
    """What so many ranks (default: those that there are) will hold and take, with a pipeline's plan."""
    ranks = math.prod(shape(stages=settings.stages, tensor=settings.tensor, size=ranks))
    return forecast(
        program.layers, settings, ranks=ranks, device=device, plan=plan, memory_limit=memory_limit, fused=fused
    )


def gathering(program: Program, settings: Settings, **how: Any) -> Settings:
    """With `gather` decided: all at once where every rank has room for it."""
    if settings.gather != "auto":
        return settings
    whole = replace(settings, gather="all")
    if settings.stages > 1 or not expected(program, whole, **how).too_large:
        return whole
    return replace(settings, gather="layers")

