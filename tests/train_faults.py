"""Runs in processes of their own that end as a test wants them to.

Each `Start` is one process: what it is told to do to itself, then `train`. Its exit code is what the test sees:
0 done, the number that a fault exits with, minus a signal's, REFUSED for a ValueError.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranks import Ended, begun, ended

REFUSED, KILLED = 2, 9
TEXT = "model small { vocab = 256 d_model = 16 context = 16 tie_embeddings = true }\n" + """
layer M = mamba2(heads=4, head_dim=8, d_state=8, chunk=8)
layer A = attention(heads=2, kv_heads=1, head_dim=8)
layer F = mlp(d_ff=32)
stack { M F A F }
"""
WORDS = "".join(f"{n} green bottles hanging on the wall; if one should fall, {n - 1}. " for n in range(99, 0, -1))
STEPS = 6
#: What a run asks of the disk, in the order in which it does.
DISK = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


@dataclass(frozen=True)
class Start:
    """fault: (name of one of FAULTS, its arguments)."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    keeping: dict[str, Any] = field(default_factory=dict)
    text: str = TEXT
    data: tuple[Path, ...] = ()
    weights: Path | None = None
    fault: tuple[Any, ...] = ()
    faulty: int = 0  #: The rank that has it.

    def __call__(self) -> None:
        import mambadsl
        from mambadsl.train.loop import Keeping
        from mambadsl.train.run import train
        from mambadsl.train.settings import Settings

        if self.fault and int(os.environ.get("RANK", "0")) == self.faulty:
            FAULTS[self.fault[0]](*self.fault[1:])
        settings = Settings(**{**dict(length=16, batch=4, steps=STEPS, lr=1e-2, parts="reference"), **self.settings})
        keeping = Keeping(**{**dict(save_every=2, quiet=True), **self.keeping})
        try:
            done = train(
                mambadsl.load(text=self.text), self.data or [words(self.folder.parent)], self.folder, settings,
                keeping=keeping, planned={"device": "cpu"}, weights=self.weights,
            )
        except ValueError as error:
            print(error)
            sys.exit(REFUSED)
        print(json.dumps(done.to_json()))


@dataclass(frozen=True)
class InTurn:
    """Several runs in one process."""

    starts: tuple[Start, ...]

    def __call__(self) -> None:
        for start in self.starts:
            print(start.folder, flush=True)
            start()


@dataclass(frozen=True)
class Typed:
    """`mambadsl ...`."""

    words: tuple[str, ...]
    fault: tuple[Any, ...] = ()
    faulty: int = 0

    def __call__(self) -> None:
        from mambadsl.cli.commands import cli

        if self.fault and int(os.environ.get("RANK", "0")) == self.faulty:
            FAULTS[self.fault[0]](*self.fault[1:])
        cli(list(self.words))


@dataclass(frozen=True)
class Launched:
    """As `torchrun --nproc-per-node 2 --max-restarts 1` does it, its processes forked too."""

    start: Start

    def __call__(self) -> None:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        here = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test", start_method="fork")
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, monitor_interval=0.1, **here
        )
        elastic_launch(config, _attempt)(self.start)


def _attempt(start: Start) -> None:
    with open(start.folder.parent / "attempts", "a") as out:
        print(os.environ["TORCHELASTIC_RESTART_COUNT"], file=out)
    start()


def words(folder: Path) -> Path:
    file = folder / "words.txt"
    if not file.exists():
        part = folder / f"words.{os.getpid()}"
        part.write_text(WORDS)
        part.rename(file)
    return file


def copies(folder: str, out: str) -> None:
    """What a process killed before each of its requests to the disk would leave, in folders of OUT; before one to make
    a file safe, it is half there."""
    count = itertools.count(1)

    def copy(name: str, args: tuple[Any, ...]) -> None:
        if not Path(folder).exists():
            return
        torn = _file_of(args[0]) if name == "fsync" else None
        place = Path(out) / f"{next(count):03d} {name} {torn.name if torn else Path(str(args[0])).name}"
        shutil.copytree(folder, place / "run")
        if torn is not None:
            half = place / "run" / torn.relative_to(folder)
            os.truncate(half, half.stat().st_size // 2)

    _before(copy)


def _before(act: Callable[[str, tuple[Any, ...]], Any]) -> None:
    inside = threading.local()

    def wrapped(name: str, real: Callable) -> Callable:
        def call(*args: Any, **rest: Any) -> Any:
            if not getattr(inside, "it", False):
                inside.it = True
                act(name, args)
                inside.it = False
            return real(*args, **rest)

        return call

    for name in DISK:
        setattr(os, name, wrapped(name, getattr(os, name)))


def _file_of(handle: Any) -> Path | None:
    """The file that is open; None for a folder."""
    path = Path(os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}"))
    return path if path.is_file() else None


def at_step(number: int, action: str, *args: Any) -> None:
    """Something happens to the process in the middle of a step, counted from 0."""
    from mambadsl.train.loop import Run

    real = Run.step

    def step(self, at):
        if at == number:
            ACTIONS[action](*args)
        return real(self, at)

    Run.step = step


def full_disk() -> None:
    """After the first save, files of more than some kilobytes cannot be written."""
    from mambadsl.train import save

    real = save.complete

    def complete(*args):
        found = real(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
        return found

    save.complete = complete


def other_data(path: str) -> None:
    """The rank reads another file."""
    global words
    words = lambda folder: Path(path)  # noqa: E731


def refuse(why: str) -> None:
    raise ValueError(why)


ACTIONS: dict[str, Callable] = {
    "exit": lambda: os._exit(KILLED), "refuse": refuse,
    "signal": lambda number, times=1: [os.kill(os.getpid(), number) for _ in range(times)],
}
FAULTS: dict[str, Callable] = {
    "copies": copies, "step": at_step, "full": full_disk, "data": other_data,
    "attempt": lambda *rest: os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and FAULTS[rest[0]](*rest[1:]),
}


def run(start: Callable[[], None], folder: Path | None = None, *, ranks: int = 1) -> Ended:
    return ended(begun(start, folder or start.folder.parent, ranks=ranks))


def in_turn(starts: Sequence[Start], folder: Path) -> Ended:
    return ended(begun(InTurn(tuple(starts)), folder), timeout=240)


def outcome(folder: Path) -> tuple[list[tuple[int, float, float]], dict[str, bytes]]:
    """Every step's number, loss and gradients' norm, as the log has them, and the last save's weights."""
    from safetensors.torch import load_file

    from mambadsl.train.export import export_run

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    [file, _] = export_run(folder, folder / "exported")
    found = {path: tensor.numpy().tobytes() for path, tensor in load_file(file).items()}
    shutil.rmtree(folder / "exported")
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line], found


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder: size and time of every file."""
    return {
        str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(folder.rglob("*")) if f.name != ".lock" and f.is_file()
    }
