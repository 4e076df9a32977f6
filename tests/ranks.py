"""Processes of their own for tests, forked from a server that has torch already: so many ranks of one run.

    ended(begun(start, folder, ranks=2))        # start: what each of them calls; pickled
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "mambadsl.train.run", "mambadsl.compile", "mambadsl.train.export", "train_faults", "train_cases", "tensor_cases",
])


@dataclass(frozen=True)
class Ended:
    """codes, said: by rank. seconds: until the last rank was gone."""

    codes: tuple[int, ...]
    said: tuple[str, ...]
    seconds: float

    @property
    def code(self) -> int:
        [code] = self.codes
        return code

    @property
    def result(self) -> dict[str, Any]:
        assert self.codes[0] == 0, self.said[0]
        return json.loads(self.said[0].splitlines()[-1])


def begun(start: Callable[[], None], folder: Path, *, ranks: int = 1) -> list[tuple[Any, Path]]:
    """Processes that run, and where they write."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(ranks):
        numbers = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        env = {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in numbers.items()}} if ranks > 1 else {}
        out = folder / f"said.{rank}"
        process = _CONTEXT.Process(target=_child, args=(start, env, str(out)))
        process.start()
        running.append((process, out))
    return running


def _child(start: Callable[[], None], environment: dict[str, str], out: str) -> None:
    handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    # As from a terminal, also where nohup started the tests.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    code = 0
    try:
        start()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    os._exit(code)


def ended(running: Sequence[tuple[Any, Path]], *, timeout: float = 60) -> Ended:
    """Waits for all of them; none may hang."""
    begin = time.monotonic()
    for process, _ in running:
        process.join(max(0.0, begin + timeout - time.monotonic()))
    hung = [k for k, (process, _) in enumerate(running) if process.exitcode is None]
    for process, _ in running:
        process.kill()
    said = tuple(out.read_text() for _, out in running)
    assert not hung, (hung, said)
    return Ended(tuple(process.exitcode for process, _ in running), said, time.monotonic() - begin)


def together(start: Callable[[], None], folder: Path, *, ranks: int, timeout: float = 400) -> Ended:
    """None of them may fail."""
    done = ended(begun(start, folder, ranks=ranks), timeout=timeout)
    failed = "\n".join(said[-6000:] for code, said in zip(done.codes, done.said) if code)
    assert not any(done.codes), failed
    return done
