"""Which kernels do the work of the ops `mamba2_core` and `mamba2_scan`: ours, or those of mamba_ssm.

Each side is a scan module and a convolution module with the same functions:

    scan    forward, states_before, backward (as `scan.py` here)
    conv    forward, backward (as `parts/triton/conv.py`)
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambadsl.kinds.rows import starts

MODULES = {
    "triton": ("mambadsl.parts.triton.ssd.scan", "mambadsl.parts.triton.conv"),
    "mamba_ssm": ("mambadsl.parts.mamba_ssm.ssd", "mambadsl.parts.causal_conv1d.kernels"),
}
#: The least and most tokens of a chunk, and those that are fastest on an H200 (head_dim 64, d_state 128).
CHUNKS = {"triton": (16, 128), "mamba_ssm": (16, 256)}
FAST_CHUNK = 128
#: In float32 a chunk of 128 tokens does not fit into registers: slow to run, and minutes to compile.
WIDE_CHUNK = 64


class Kernels(NamedTuple):
    scan: Any
    conv: Any


@cache
def kernels(name: str) -> Kernels:
    return Kernels(*map(import_module, MODULES[name]))


def chunk_length(wanted: int, chunk: int | None, *, of: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """The chunk that the kernels run with: `chunk`, else a power of two near the layer's own `wanted`. It changes
    speed and memory, not the result. ValueError where `chunk` is none that they take."""
    least, most = CHUNKS[of]
    if chunk is None:
        fast = WIDE_CHUNK if of == "triton" and dtype.itemsize == 4 else FAST_CHUNK
        return fast if wanted >= fast else max(least, 1 << (wanted.bit_length() - 1))
    if not least <= chunk <= most or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two from {least} to {most}, not {chunk}")
    return chunk


def documents(segments_BT: Tensor | None) -> Tensor | None:
    """The documents of each row counted from 0, int32: kernels compare numbers across a chunk, and take the state
    before the row to be document 0's."""
    return None if segments_BT is None else starts(segments_BT).cumsum(1, dtype=torch.int32)
