"""How a kernel that walks over rows is laid on the GPU: shared by the norms here.

In: a table of launches and a call's shape and dtypes; out: the launch, and how many programs. Nothing is measured
while a model runs: the tables come from `benchmarks/kernels.py --tune`.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Launch(NamedTuple):
    """Rows a program holds at once and its warps; for kernels that loop over rows also the depth of the loop's
    pipeline, programs for each multiprocessor, and registers of a thread (None: as many as ptxas likes), so few
    that those programs fit."""

    rows: int
    warps: int
    stages: int = 1
    per_processor: int = 1
    registers: int | None = None


def launch_of(table: dict[int, Launch], block: int) -> Launch:
    """The launch for a block of channels, a power of two; blocks narrower than the table's first hold as many
    channels as that, in more rows."""
    narrowest = min(table)
    if block >= narrowest:
        return table[block]
    launch = table[narrowest]
    return launch._replace(rows=min(launch.rows * narrowest // block, 64))


def persistent(
    launch: Launch, block: int, *, rows: int, pieces: int, read: tuple[Tensor, ...]
) -> tuple[Launch, int]:
    """(The launch with a pipeline that shared memory can hold, programs for each of a row's `pieces`: each walks over
    as many blocks of rows as the others, and together they fill the GPU once). `read`: what a step reads."""
    processors, shared_bytes = _gpu(read[0].device)
    step_bytes = launch.rows * block * sum(t.element_size() for t in read)
    stages = max(1, min(launch.stages, 1 + shared_bytes // step_bytes))
    steps = triton.cdiv(rows, launch.rows)
    programs = max(1, min(steps, processors * launch.per_processor // pieces))
    return launch._replace(stages=stages), triton.cdiv(steps, max(1, triton.cdiv(steps, programs)))


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """(Multiprocessors, bytes of shared memory a program may have, less a margin for reductions); of a small
    GPU where Triton's interpreter runs on a CPU."""
    if device.type != "cuda":
        return 2, 2**16
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin - 2**14 * 2


def dense_rows(x: Tensor) -> Tensor:
    """[..., D] -> [R, D] with stride 1 inside: a view where the strides allow it."""
    x_RD = x.reshape(-1, x.shape[-1])
    return x_RD if x_RD.stride(-1) == 1 else x_RD.contiguous()
