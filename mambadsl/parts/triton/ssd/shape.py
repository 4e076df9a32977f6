"""What the SSD kernels share: how a chunk and the heads of a group are cut, precision, loads and decays of a tile.

A chunk of more than 64 tokens is two tiles, in kernels that cut it. Within a tile, exp(a_i - a_j) is computed for each
pair; between them it is exp(a_i - m) exp(m - a_j), m the sum at the first tile's end: neither factor exceeds 1, and the
exponentials are of tokens instead of pairs. Refuses (ValueError) chunks of more than two tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 64
LOG2E = tl.constexpr(1.4426950408889634)


class Loop(NamedTuple):
    """How a kernel that loops over heads runs: warps, depth of the pipeline of loads, programs on a multiprocessor,
    registers of a thread (None: as ptxas likes). cut: a chunk of more than TILE tokens into two tiles; uncut, two
    warpgroups have half of its rows each, and compute more exponentials. With 2 stages the next head's loads are asked
    for when a head is done, with 3 before it begins."""

    warps: int
    stages: int
    programs: int
    registers: int | None = None
    cut: bool = True

    def options(self, dtype: torch.dtype, *, rows: int = 128, state: int = 0) -> dict[str, int | None]:
        """rows: of a tile. state: numbers in a head's state, where they are read."""
        # Tiles of float32 and wide states fill shared memory without so deep a pipeline.
        stages = 1 if dtype == torch.float32 else min(self.stages, 3 if state <= 2**13 else 2 if state <= 2**14 else 1)
        # Uncut, a warpgroup of 4 warps is to have 64 rows whole: a row in two would go through shared memory.
        warps = self.warps if self.cut else min(self.warps, max(4, rows // 16))
        return dict(STAGES=stages, num_warps=warps, maxnreg=self.registers)


def tiles(Q: int, loop: Loop) -> int:
    """Tiles of a chunk."""
    if Q > 2 * TILE:
        raise ValueError(f"these kernels take chunks of at most {2 * TILE} tokens, not {Q}")
    return 2 if loop.cut and Q > TILE else 1


def block(width: int) -> int:
    """The tile that holds `width` channels: a power of two, at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(width))


def precision(x: torch.Tensor) -> str:
    """Of matrix products: of float32 inputs three TF32 products, about as exact; narrower ones as they are."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def splits(loop: Loop, *, pieces: int, ratio: int, device: torch.device) -> int:
    """Into how many programs the `ratio` heads of a group are split, `pieces` (chunks, groups) being side by side:
    least rounds of heads, where starting a program costs about as much as two of them."""
    slots = processors(device) * loop.programs
    divisors = [m for m in range(1, ratio + 1) if ratio % m == 0]
    return min(divisors, key=lambda m: triton.cdiv(pieces * m, slots) * (ratio // m + 2))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 where Triton's interpreter runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def read(at, stride, rows, columns, height, width, WHOLE: tl.constexpr):
    """A tile of a matrix; 0 outside of it. WHOLE: no part of the tile is."""
    where = at + rows[:, None] * stride + columns[None, :]
    if WHOLE:
        loaded = tl.load(where)
    else:
        loaded = tl.load(where, mask=(rows[:, None] < height) & (columns[None, :] < width), other=0)
    return loaded


@triton.jit
def write(at, stride, rows, columns, height, width, values, WHOLE: tl.constexpr):
    where = at + rows[:, None] * stride + columns[None, :]
    values = values.to(at.dtype.element_ty)
    if WHOLE:
        tl.store(where, values)
    else:
        tl.store(where, values, mask=(rows[:, None] < height) & (columns[None, :] < width))


@triton.jit
def pairs(
    one, other, rows, columns, left, segments, HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Products of tokens with tokens, 0 between documents. Out of a matrix product, they lie in registers as the next
    product reads them; loaded, they would pass through shared memory once a head. segments: at the chunk's start."""
    product = tl.dot(one, tl.trans(other), input_precision=PRECISION)
    if HAS_SEGMENTS:
        mine = tl.load(segments + rows, mask=rows < left, other=-1)
        theirs = tl.load(segments + columns, mask=columns < left, other=-1)
        product = tl.where(mine[:, None] == theirs[None, :], product, 0.0)
    return product


@triton.jit
def same_document(segments, rows, left, of, known):
    """1 where a token is of the document of token `of`, 0 elsewhere; of document 0 where `of` is not `known`.
    segments: at the chunk's first token, which has `left` tokens from there on."""
    mine = tl.load(segments + rows, mask=rows < left, other=-1)
    return (mine == tl.load(segments + of, mask=known, other=0)).to(tl.float32)
