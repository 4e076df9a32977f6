"""A save of a run, of any mesh -> a folder of safetensors under the model's own names, and the model's text.

One process, no group; a weight in memory at a time. Refuses (ValueError) a folder without a run, a step that
is not there, a save that cannot be read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from mambadsl.build.shards import MAX_FILE_BYTES, Unit, blank, save_shards
from mambadsl.graph.json import from_data
from mambadsl.graph.write import write
from mambadsl.train.save import Saved, damaged, newest, read, saves, stored

MODEL = "model.mdl"


class _Reader(FileSystemReader):
    """The save's table, read once for all weights."""

    @cache
    def read_metadata(self) -> Metadata:
        return super().read_metadata()


def export_run(
    run: Path, folder: Path, *, step: int | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[Path, ...]:
    """The files written. step: of the save (default: the last complete one)."""
    saved = _save(run, step)
    reader = _Reader(saved.folder)
    shapes = {key: shape for key, shape in stored(saved).items() if key.startswith("model.")}
    units = [
        Unit({key.removeprefix("model."): blank(shape, torch.float32)}, partial(_weight, saved, reader, key, shape))
        for key, shape in shapes.items()
    ]
    graph = from_data(saved.about["graph"])
    about = {"format": "pt", "model": graph.name, "step": str(saved.step)}
    folder.mkdir(parents=True, exist_ok=True)
    written = save_shards(
        folder, "weights", units, index="weights.index.json", about=about, max_file_bytes=max_file_bytes
    )
    (folder / MODEL).write_text(write(graph), encoding="utf-8")
    return *written, folder / MODEL


def _weight(saved: Saved, reader: FileSystemReader, key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    found = {key: torch.empty(shape)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(found, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # Of other bytes than were written, anything may come.
        raise damaged(saved, error) from None
    yield key.removeprefix("model."), found[key]


def _save(run: Path, step: int | None) -> Saved:
    there = {int(folder.name.removeprefix("step-")): folder for folder in saves(run)}
    if run.resolve() in saves(run.resolve().parent):
        at = run.resolve()
        raise ValueError(f"`{run}` is a save: give its run, `{at.parent}`, with --step {int(at.name[5:])}")
    if not there:
        raise ValueError(f"`{run}` has no save of a run" if run.is_dir() else f"there is no folder `{run}`")
    if step is None:
        found, doubts = newest(run)
        if found is None:
            raise ValueError("\n".join([f"no save of `{run}` can be read:", *(f"  {doubt}" for doubt in doubts)]))
        return found
    if step not in there:
        raise ValueError(f"`{run}` has no save of step {step}; there are {', '.join(map(str, sorted(there)))}")
    found = read(there[step])
    if isinstance(found, str):
        raise ValueError(found)
    return found
