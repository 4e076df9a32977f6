"""Times on a device: events where work is queued, the clock elsewhere.

`mark()` notes a moment; `between(a, b)` are the seconds from one to the other, asked when the work is done.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    def __init__(self, device: torch.device):
        self.queued = device.type == "cuda"

    def mark(self) -> Any:
        if not self.queued:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        if not self.queued:
            return b - a
        b.synchronize()
        return a.elapsed_time(b) / 1e3
