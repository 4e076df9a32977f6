"""A run on disk: every save complete or not there, readable on any mesh.

RUN/step-00000500/ holds torch.distributed.checkpoint's files, with weights and the optimizer's moments by path, and
`run.json`, written last: the step, the settings, every file's size. While it is written it is called
`step-00000500.part`. `newest` finds the last one whose files are all there, whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from mambadsl.build.checkpoint import listed
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.weights import all_weights
from mambadsl.train.held import LoadPlanner, SavePlanner, Sliced, local
from mambadsl.train.optimizer import Optimizer
from mambadsl.train.pieces import Piece
from mambadsl.train.world import World

ABOUT = "run.json"
PART = ".part"


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete save. about: what `run.json` says."""

    folder: Path
    step: int
    about: dict[str, Any]


def saves(run: Path) -> list[Path]:
    """Folders of saves, oldest first, whole or not."""
    return sorted(f for f in run.glob("step-*") if f.is_dir() and f.name[5:].isdigit())


def newest(run: Path) -> tuple[Saved | None, list[str]]:
    """The last complete save, and what is wrong with later ones."""
    doubts: list[str] = []
    for folder in reversed(saves(run)):
        found = read(folder)
        if isinstance(found, Saved):
            return found, doubts
        doubts.append(found)
    return None, doubts


def read(folder: Path) -> Saved | str:
    """The save in a folder, or what is wrong with it."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        files, step = dict(about["files"]), int(about["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"`{folder}` has no readable `{ABOUT}` ({type(error).__name__})"
    for name, size in files.items():
        file = folder / name
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            what = "is missing" if there is None else f"has {there:,} of {size:,} bytes"
            return f"`{file}` {what}"
    return Saved(folder, step, about)


def misfit(saved: Saved, graph: LayerGraph) -> list[str]:
    """What the save lacks of the model's weights, has beside them, or has of another shape; read before anything is
    allocated."""
    entries = FileSystemReader(saved.folder).read_metadata().state_dict_metadata
    stored = {key.removeprefix("model."): tuple(e.size) for key, e in entries.items() if key.startswith("model.")}
    wanted = {path: tuple(weight.shape) for path, weight in all_weights(graph).items()}
    missing = [path for path in wanted if path not in stored]
    unknown = [path for path in stored if path not in wanted]
    bent = [
        f"`{path}` is {list(stored[path])} in the save, {list(shape)} in the model"
        for path, shape in wanted.items() if path in stored and stored[path] != shape
    ]
    return [*listed("missing", missing, unknown), *listed("unknown", unknown, missing), *bent[:12]]


class Saver:
    """Writes saves beside the training. Every rank calls the same methods at the same steps."""

    def __init__(self, run: Path, world: World, pieces: Sequence[Piece], optimizer: Optimizer, *, keep: int):
        self.run, self.world, self.pieces, self.optimizer, self.keep = run, world, pieces, optimizer, keep
        self._going: tuple[Future, Path, dict[str, Any]] | None = None
        if world.first:
            run.mkdir(parents=True, exist_ok=True)
            for left in run.glob(f"step-*{PART}"):
                shutil.rmtree(left)
        world.barrier()

    def tensors(self) -> dict[str, Any]:
        """Key -> what this rank has of the tensor; of copies of one weight, the first."""
        found: dict[str, Tensor | Sliced] = {}
        for made in self.pieces:
            for path, tensor in made.model.tensors().items():
                found.setdefault(f"model.{path}", self._held(path, tensor.detach()))
        for path, name, tensor in self.optimizer.state():
            found.setdefault(f"optim.{path}.{name}", self._held(path, tensor))
        return found

    def _held(self, path: str, tensor: Tensor) -> Tensor | Sliced:
        held = next((made.slices[path] for made in self.pieces if path in made.slices), None)
        return tensor if held is None else Sliced(tensor, held)

    def start(self, step: int, about: dict[str, Any]) -> str | None:
        """Begins a save; training may go on at once. Gives what went wrong with the one before."""
        trouble = self.finish()
        part = self.run / f"step-{step:08d}{PART}"
        if self.world.first and part.exists():
            shutil.rmtree(part)
        self.world.barrier()
        how = dict(planner=SavePlanner(), process_group=self.world.files)
        going = dcp.async_save(self.tensors(), checkpoint_id=part, **how)
        self._going = going, part, {"step": step, **about}
        return trouble

    def finish(self, *, wait: bool = True) -> str | None:
        """Completes the save that is being written, waiting for it if asked to; what went wrong, if anything did."""
        if self._going is None or not (wait or self._going[0].done()):
            return None
        going, part, about = self._going
        self._going = None
        try:
            going.result()
            if self.world.first:
                complete(part, about)
                prune(self.run, self.keep)
        except Exception as error:  # Of another thread, of a disk: whatever it is, training itself is sound.
            if self.world.first:
                shutil.rmtree(part, ignore_errors=True)
            why = " ".join(str(error).split())[:300] or type(error).__name__
            return f"the save of step {about['step']} failed, and is not there: {why}"
        return None

    def load(self, saved: Saved) -> int:
        """Weights and moments of the save; gives its step."""
        tensors = self.tensors()
        dcp.load(tensors, checkpoint_id=saved.folder, planner=LoadPlanner(), process_group=self.world.files)
        for made in self.pieces:
            for path, tensor in made.model.tensors().items():
                _same(tensor.detach(), tensors[f"model.{path}"])
        for path, name, tensor in self.optimizer.state():
            _same(tensor, tensors[f"optim.{path}.{name}"])
        self.optimizer.resume(saved.step)
        return saved.step


def _same(tensor: Tensor, loaded: Tensor | Sliced) -> None:
    """A second copy of a weight gets what the first one got."""
    if isinstance(loaded, Sliced):
        tensor, loaded = local(tensor), loaded.tensor
    if tensor.data_ptr() != loaded.data_ptr():
        tensor.copy_(loaded)


def complete(part: Path, about: dict[str, Any]) -> Path:
    """Says what is there, and gives the folder its name."""
    files = {file.name: file.stat().st_size for file in sorted(part.iterdir()) if file.name != ABOUT}
    with open(part / ABOUT, "w", encoding="utf-8") as out:
        json.dump({**about, "files": files}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    folder = part.with_suffix("")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)
    _sync(folder.parent)
    return folder


def prune(run: Path, keep: int) -> None:
    """Leaves the last `keep` complete saves."""
    whole = [folder for folder in saves(run) if isinstance(read(folder), Saved)]
    for old in whole[:-keep]:
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


