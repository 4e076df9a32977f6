"""SIGTERM, Ctrl-C and a terminal that is gone during a run: the step is finished and saved; a second Ctrl-C ends it at
once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from mambadsl.train.world import World


class Stop:
    """While it is open, signals are noted. signal: the one that came.

    It is open while steps are done: before, there is nothing to save, and a process ends as any other does.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # Under nohup, a run outlives its terminal.
        hangup = getattr(signal, "SIGHUP", None)
        outlives = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, *([] if outlives else [hangup])):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self, world: World) -> str | None:
        """The name of the signal that any rank has got: all stop after the same step."""
        number = world.most(self.signal or 0)
        return signal.Signals(number).name if number else None
