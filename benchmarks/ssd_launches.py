"""The launches that `ssd.py --tune` tries: rows with the best ones of each of our SSD kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def launches(name: str) -> list[dict[str, Any]]:
    """The launches to try."""
    from mambadsl.parts.triton.ssd.shape import Loop
    from mambadsl.parts.triton.ssd.states import Pass

    if name in ("forward", "backward"):
        return []
    if name.startswith("pass"):
        return [dict(how=Pass(*h)) for h in itertools.product((256, 512, 1024, 2048), (1, 2, 4), (1, 4))
                if 2 <= h[0] // (32 * h[1]) <= 16]
    if name in ("scan", "dx", "dscores"):
        loops = [Loop(*l) for l in itertools.product((4,), (2, 3, 4), (2, 4), (None,), (True,))]
        loops += [Loop(*l) for l in itertools.product((8,), (2, 3), (1, 2), (None,), (True, False))]
        return [dict(loop=loop) for loop in loops + [Loop(8, 3, 2, 128), Loop(4, 2, 2, 168)]]
    loops = [Loop(*l) for l in itertools.product((4, 8), (2, 3, 4, 5), (1, 2, 4))]
    if name in ("dB", "dC"):
        return [dict(loop=loop, rows=16 * loop.warps) for loop in loops]
    return [dict(loop=loop) for loop in loops]


def tune(kernels: dict[str, Any], *, case: Callable[[str], str], device: str, only: list[str] | None, runs: int,
         timer: Callable, keep: int = 4, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The best launches of each of `ssd.our_kernels`. case: a row's name from the kernel's."""
    import torch

    prepare = functools.partial(torch.cuda.set_device, 0) if device == "cuda" else None
    for name, (run, _) in kernels.items():
        tried = launches(name)[:limit] if only is None or name in only else []

        def once(launch: dict[str, Any], run: Callable = run) -> Exception | None:
            try:
                run(**launch)
            except Exception as failure:  # Too much shared memory: the others go on.
                return failure

        # Compiling takes longer than all the measuring, and goes on in several threads at once.
        distinct = [launch for launch in tried if "loop" not in launch or launch["loop"].programs == 2]
        with ThreadPoolExecutor(8, initializer=prepare) as pool:
            list(pool.map(once, distinct))
        found = []
        for launch in tried:
            failure = once(launch)
            if failure is None:
                found.append((timer(lambda: run(**launch), runs=runs), launch))
            else:
                yield {"case": case(name), "launch": launch, "failed": first_line(failure)}
        for ms, launch in sorted(found, key=lambda pair: pair[0])[:keep]:
            yield {"case": case(name), "by": "mambadsl", "ms": ms, "launch": launch}


def first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:150]
