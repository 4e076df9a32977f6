"""Launch configurations of the decoding kernels, by batch: tables, no autotuning at run time. No torch.

For one H200 and mamba2-1.3b shapes: `benchmarks/decode_kernels.py --tune` measures the candidates by batch.
Each table is a tuple of (largest batch, configuration), smallest first; the last row serves larger batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Of a matrix-vector product: weights that a program holds at once, in blocks of at most so many columns."""

    elements: int
    columns: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tile:
    """rows: output channels of one program, or keys of one block. columns: inputs of one block, which `split` warps
    share between them (each has all rows of a part); 1: they share the rows."""

    rows: int
    columns: int = 0
    warps: int = 4
    stages: int = 3
    split: int = 1


@dataclass(frozen=True)
class Scan:
    """Of the mixer. rows: of a head's state, for one program. registers: most of a thread (None: as the compiler
    likes). ahead: each program asks for the state of the one so many later (0: for none)."""

    rows: int
    warps: int = 1
    registers: int | None = None
    ahead: int = 0


#: How projections run. matvec: one kernel with norm before and sum after, weights streamed once, multiply-adds on
#: vectors. skinny: a norm kernel, then tensor-core products with the same epilogues. cublas: library products.
#: cublas_rounded: the library's product in the weights' dtype, summed into the stream by a kernel of its own.
#: For the projection into a layer, and the one out of it.
PATHS = ((3, ("matvec", "matvec")), (16, ("skinny", "skinny")), (1 << 30, ("cublas", "cublas")))

MATVEC = ((2, Block(16384, 4096, 8)), (8, Block(8192, 4096, 8)))
SKINNY = ((32, Tile(16, 256, 4, 4, 4)),)
#: By bytes of a state element.
MIXER = {
    2: ((1, Scan(16, 2)), (256, Scan(16))),
    4: ((1, Scan(16, 2)), (256, Scan(8))),
}
#: Largest batch whose mixer convolves in the kernel of the scan: in larger ones a kernel of its own does it once for
#: all programs of a group, and leaves the norm's kernel nothing to move on.
MOST_CONVOLVED_INSIDE = 8
#: Keys of one block of attention are `rows`.
ATTENTION = ((256, Tile(64, warps=4)),)
#: Programs that attention aims at (three for each of 132 multiprocessors), and most splits of one row's keys.
ATTENTION_PROGRAMS, MOST_SPLITS = 396, 64


def for_batch(table: tuple[tuple[int, T], ...], batch: int) -> T:
    return next((entry for most, entry in table if batch <= most), table[-1][1])


def paths_for(batch: int) -> tuple[str, str]:
    return for_batch(PATHS, batch)
