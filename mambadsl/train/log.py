"""What a run tells: a line a step in RUN/log.jsonl, a progress bar or lines on the terminal, TensorBoard if asked for.

Only the first rank tells anything.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mambadsl.data.cache import whole
from mambadsl.train.save import LOG

#: Seconds between lines where the terminal shows no bar.
EVERY_S = 10


class Log(AbstractContextManager):
    """file: RUN/log.jsonl, from which lines of steps after `start` go: the run does them again."""

    def __init__(self, run: Path, *, steps: int, start: int, quiet: bool = False, tensorboard: bool = False):
        self.steps, self.quiet = steps, quiet or sys.stderr is None
        run.mkdir(parents=True, exist_ok=True)
        path = run / LOG
        if path.exists():
            _cut(path, start)
        self.file = open(path, "ab", buffering=0)
        self._due, self._full = b"", False
        self.board = _board(run) if tensorboard else None
        self.bar = None if self.quiet or not sys.stderr.isatty() else _bar(steps, start)
        self._told = -float("inf")

    def __exit__(self, *_: Any) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()

    def step(self, step: int, facts: Mapping[str, float]) -> None:
        """The facts of step `step`, counted from 1."""
        self._write({"step": step, **facts})
        if self.bar is not None:
            self.bar.update(0, completed=step, words=words(facts))
        elif not self.quiet and (time.monotonic() - self._told > EVERY_S or step == self.steps):
            self._told = time.monotonic()
            self.say(f"step {step:,} of {self.steps:,}  {words(facts)}")

    def held_out(self, step: int, loss: float) -> None:
        self._write({"step": step, "held_out_loss": loss})
        self.say(f"step {step:,}  held-out loss {loss:.4f}")

    def say(self, line: str) -> None:
        if self.quiet:
            return
        try:
            if self.bar is not None:
                self.bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=sys.stderr, flush=True)
        except OSError:  # Whoever read is gone, or the disk is full: no reason for a run to end.
            self.quiet = True

    def _write(self, facts: Mapping[str, Any]) -> None:
        self._due += json.dumps(facts).encode() + b"\n"
        try:
            while self._due:
                self._due = self._due[self.file.write(self._due) :]
            self._full = False
        except OSError as error:  # A full disk: what is due waits for the next time.
            if not self._full:
                self.say(f"the log cannot be written: {error.strerror}")
            self._full = True
        if self.board is not None:
            for name, value in facts.items():
                if name != "step":
                    self.board.add_scalar(name, value, facts["step"])


def words(facts: Mapping[str, float]) -> str:
    """For people, in the order of importance."""
    shown = [f"loss {facts['loss']:.4f}", f"norm {facts['grad_norm']:.2f}", f"{facts['tokens_per_s']:,.0f} tokens/s"]
    if "imbalance" in facts:
        shown.append(f"imbalance {facts['imbalance']:.2f}")
    if "peak_share" in facts:
        shown.append(f"{facts['peak_share']:.0%} of peak")
    if "memory_bytes" in facts:
        shown.append(f"{facts['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(shown)


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, of a run's log."""
    lines = (json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines())
    return {facts["step"]: facts["loss"] for facts in lines if "loss" in facts}


def _cut(path: Path, start: int) -> None:
    """Without the lines after step `start`; the last may be half written. ValueError for a file of somebody else's."""
    kept, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        step = _step(line)
        if step is None and number < len(lines):
            raise ValueError(f"`{path}` is no log of a run (line {number}): give another folder")
        if step is not None and step <= start:
            kept.append(line + "\n")
    with whole(path) as out:
        out.write("".join(kept).encode())


def _step(line: str) -> int | None:
    """Of a line of a run's log."""
    try:
        facts = json.loads(line)
        return facts["step"] if {"grad_norm", "held_out_loss"} & facts.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _bar(steps: int, start: int) -> Any:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[words]}")
    from rich.console import Console

    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task("", total=steps, completed=start, words="")
    bar.start()
    return bar


def _board(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'mambadsl[train]'") from None
    return SummaryWriter(run)
