"""The learning rate over a run: warm-up, then one of the known shapes. A function of the step alone.

cosine: Loshchilov and Hutter 2017. wsd (warm-up, stable, decay): Hu et al. 2024 (MiniCPM), with the square-root decay
of Haegele et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: (share of the way from the end of the warm-up to the end, share of that way that decays) -> 1 down to 0.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda way, decay: 0.5 * (1 + math.cos(math.pi * way)),
    "wsd": lambda way, decay: 1.0 if way <= 1 - decay else 1 - math.sqrt((way - (1 - decay)) / decay),
    "linear": lambda way, decay: 1 - way,
    "constant": lambda way, decay: 1.0,
}


def rate(step: int, *, steps: int, lr: float, warmup: int, schedule: str, decay: float, floor: float) -> float:
    """The learning rate of a step, counted from 0: rises to `lr` over `warmup` steps; one after the last would
    have `floor * lr`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    way = (step - warmup) / max(1, steps - warmup)
    return lr * (floor + (1 - floor) * SCHEDULES[schedule](way, decay))
