"""One question in a process of its own: words in, JSON lines out, whatever happens to that process.

In: words for `answer.py`, a time limit. Out: `Ended`. Nothing here raises for what the process did.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mambadsl.parts.plugins import loaded_files

_running: set[subprocess.Popen] = set()
_ending = threading.Event()
#: Held from the look at `_ending` until the new process is among the running, so that none is missed.
_starting = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """answers: the JSON objects it printed. code: its exit status, negative for a signal; None where it ran past the
    limit and was ended. error: the tail of its standard error."""

    answers: tuple[dict[str, Any], ...]
    code: int | None
    error: str
    seconds: float

    @property
    def signal(self) -> str | None:
        """`SIGSEGV`, where a signal ended it."""
        if self.code is None or self.code >= 0:
            return None
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


def ask(*words: str, limit_s: float) -> Ended:
    """Runs `answer.py` with the words. Files given by `--load` are loaded there too.

    Raises InterruptedError inside `all_ended`.
    """
    loads = [word for path in loaded_files() for word in ("--load", str(path))]
    command = [sys.executable, "-m", "mambadsl.run.doctor.answer", *loads, *words]
    started = time.monotonic()
    with _starting:
        if _ending.is_set():
            raise InterruptedError("no more questions")
        # A group of its own: compilers that it started end with it.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        _running.add(child)
    try:
        out, error = child.communicate(timeout=limit_s)
        code = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        (out, error), code = child.communicate(), None
    finally:
        _running.discard(child)
    seconds = time.monotonic() - started
    return Ended(tuple(_objects(out)), code, error.decode(errors="replace")[-4000:], seconds)


@contextmanager
def all_ended() -> Iterator[None]:
    """Ends the processes that other threads wait for; inside, no new ones are started."""
    with _starting:
        _ending.set()
    try:
        for child in list(_running):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        yield
    finally:
        _ending.clear()


def _objects(out: bytes) -> list[dict[str, Any]]:
    """What packages print themselves lies between."""
    found = []
    for line in out.decode(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
