"""SIGTERM and Ctrl-C during a run: the step is finished and saved; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from mambadsl.train.world import World


class Stop:
    """While it is open, signals are noted. signal: the one that came."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self, world: World) -> bool:
        """Whether any rank was told to stop: all stop after the same step."""
        return world.everywhere(self.signal is not None) if world.size > 1 else self.signal is not None
