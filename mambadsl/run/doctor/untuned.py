"""Autotuned Triton kernels without the tuning: they take their smallest blocks at once.

Packages try dozens of launches for each new size, which takes minutes and changes nothing but speed. For checks of
results: doctor's, and tests on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def untuned() -> Iterator[None]:
    """Inside, `triton.autotune` runs and keeps the smallest of its configurations, and writes nothing to disk. What
    was tuned before stays so. Without triton, nothing happens."""
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        yield
        return
    replaced = {"_bench": _size_for_time, "check_disk_cache": _no_disk}
    before = {name: vars(Autotuner)[name] for name in replaced}
    for name, function in replaced.items():
        setattr(Autotuner, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(Autotuner, name, function)


def _size_for_time(self: Any, *args: Any, config: Any, **meta: Any) -> int:
    """Numbers in a block times stages: what the tuner takes for milliseconds."""
    size = config.num_stages
    for value in config.kwargs.values():
        size *= value if isinstance(value, int) else 1
    return size


def _no_disk(self: Any, key: Any, configs: Any, benchmark: Callable[[], None]) -> bool:
    """Sizes must not be found as times by a process that does tune. False: nothing came from the cache."""
    benchmark()
    return False
