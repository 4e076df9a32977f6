"""A run on disk: every save complete or not there, readable on any mesh.

RUN/step-00000500/ holds torch.distributed.checkpoint's files, with weights and the optimizer's moments by path, and
`run.json`, written last: the step, the settings, every file's size. While it is written it is called
`step-00000500.part`, and while it is deleted `step-00000500.old`. `newest` finds the last one whose files are all
there, whole. One run at a time has the folder (`held`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from mambadsl.build.checkpoint import LISTED, listed
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.weights import all_weights
from mambadsl.train.held import LoadPlanner, SavePlanner, Sliced, local
from mambadsl.train.optimizer import Optimizer
from mambadsl.train.pieces import Piece
from mambadsl.train.world import World

ABOUT = "run.json"
PART, OLD = ".part", ".old"
LOCK = ".lock"
#: Of a run, beside its saves; while they are written, they have the ending of a part.
LOG, COMPARED = FILES = "log.jsonl", "compared.json"


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete save. about: what `run.json` says."""

    folder: Path
    step: int
    about: dict[str, Any]


@contextmanager
def held(run: Path) -> Iterator[None]:
    """The folder, made if it is not there, for this process alone; the system lets go of it however a process ends.
    ValueError if it cannot be written, or another one has it."""
    from filelock import FileLock, Timeout

    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is training in `{run}`: wait for its end, or give another folder") from None
    except OSError as error:
        raise ValueError(f"the folder `{run}` cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def saves(run: Path) -> list[Path]:
    """Folders of saves, oldest first, whole or not."""
    return _folders(run, "")


def _folders(run: Path, ending: str) -> list[Path]:
    """step-NUMBER and this ending: nothing else in the folder is a run's."""
    named = (f for f in run.glob(f"step-*{ending}") if f.name[5:].removesuffix(ending).isdecimal())
    return sorted(f for f in named if f.is_dir())


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


def stored(saved: Saved) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a save. ValueError if its table cannot be read."""
    try:
        entries = FileSystemReader(saved.folder).read_metadata().state_dict_metadata
        return {key: tuple(entry.size) for key, entry in entries.items()}
    except Exception as error:  # A pickle of other bytes fails in any way.
        raise damaged(saved, error) from None


def damaged(saved: Saved, error: BaseException) -> ValueError:
    return ValueError(
        f"the save `{saved.folder}` cannot be read ({type(error).__name__}: {_short(error)}); without that folder, the "
        "run goes on from the save before"
    )


def misfit(saved: Saved, graph: LayerGraph) -> list[str]:
    """What the save lacks of the model's weights, has beside them, or has of another shape; read before anything is
    allocated."""
    found = stored(saved)
    shapes = {key.removeprefix("model."): shape for key, shape in found.items() if key.startswith("model.")}
    wanted = {path: tuple(weight.shape) for path, weight in all_weights(graph).items()}
    missing = [path for path in wanted if path not in shapes]
    unknown = [path for path in shapes if path not in wanted]
    bent = [
        f"`{path}` is {list(shapes[path])} in the save, {list(shape)} in the model"
        for path, shape in wanted.items() if path in shapes and shapes[path] != shape
    ]
    return [*listed("missing", missing, unknown), *listed("unknown", unknown, missing), *bent[:LISTED]]


class Saver:
    """Writes saves beside the training. Every rank calls the same methods at the same steps."""

    def __init__(self, run: Path, world: World, pieces: Sequence[Piece], optimizer: Optimizer, *, keep: int):
        self.run, self.world, self.pieces, self.optimizer, self.keep = run, world, pieces, optimizer, keep
        self._going: tuple[Future, Path, dict[str, Any]] | None = None

    def tidy(self) -> str | None:
        """Takes away what runs that were killed have left, and saves past those that are kept."""
        if self.world.first:
            for left in _folders(self.run, PART) + _folders(self.run, OLD):
                shutil.rmtree(left, ignore_errors=True)
            for name in FILES:
                (self.run / f"{name}{PART}").unlink(missing_ok=True)
        return self._prune()

    def _prune(self) -> str | None:
        try:
            if self.world.first:
                prune(self.run, self.keep)
        except OSError as error:
            return f"old saves cannot be deleted: {_short(error)}"
        return None

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
        if self.world.first:
            shutil.rmtree(part, ignore_errors=True)
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
        # Of another thread, of a disk: whatever it is, training itself is sound. (torch's own is no Exception.)
        except (Exception, CheckpointException) as error:
            if self.world.first:
                shutil.rmtree(part, ignore_errors=True)
            return f"the save of step {about['step']} failed, and is not there: {_short(error)}"
        return self._prune()

    def load(self, saved: Saved) -> int:
        """Weights and moments of the save; gives its step. ValueError if they cannot be read."""
        tensors = self.tensors()
        try:
            dcp.load(tensors, checkpoint_id=saved.folder, planner=LoadPlanner(), process_group=self.world.files)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise damaged(saved, first) from None
        for made in self.pieces:
            for path, tensor in made.model.tensors().items():
                _same(tensor.detach(), tensors[f"model.{path}"])
        for path, name, tensor in self.optimizer.state():
            _same(tensor, tensors[f"optim.{path}.{name}"])
        self.optimizer.resume(saved.step)
        return saved.step


def _same(tensor: Tensor, loaded: Tensor | Sliced) -> None:
    """A second copy of a weight gets what the first one got."""
    # Of rows, never of a DTensor: all of those have the address 0.
    mine, theirs = local(tensor), loaded.tensor if isinstance(loaded, Sliced) else local(loaded)
    if mine.data_ptr() != theirs.data_ptr():
        mine.copy_(theirs)


def complete(part: Path, about: dict[str, Any]) -> Path:
    """Says what is there, and gives the folder its name. OSError if a rank's files are not there."""
    files = {file.name: file.stat().st_size for file in sorted(part.iterdir()) if file.name != ABOUT}
    written = FileSystemReader(part).read_metadata().storage_data.values()
    if lost := sorted({piece.relative_path for piece in written} - files.keys()):
        raise OSError(f"{', '.join(lost)} not found: the folder of a run must be the same one for all machines")
    with open(part / ABOUT, "w", encoding="utf-8") as out:
        json.dump({**about, "files": files}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    _sync(part)
    folder = part.with_suffix("")
    if folder.exists():
        _delete(folder)
    os.replace(part, folder)
    _sync(folder.parent)
    return folder


def prune(run: Path, keep: int) -> None:
    """Leaves the last `keep` complete saves, and what is newer."""
    there = saves(run)
    whole = [folder for folder in there if isinstance(read(folder), Saved)]
    for old in there:
        if len(whole) > keep and old < whole[-keep]:
            _delete(old)


def _delete(folder: Path) -> None:
    """At once, as far as anybody sees: half of it is no save."""
    old = folder.with_suffix(OLD)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old)


def _short(error: BaseException) -> str:
    """In one line, without the traces that torch puts into its messages."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
