"""What a training run is told, apart from the model and the data.

In: numbers as a user gives them. Out: a frozen `Settings`. Refuses (ValueError) what cannot be trained with, with the
nearest that can.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mambadsl.train.schedule import SCHEDULES

DTYPES = ("fp32", "bf16")
#: When data ranks gather weights; `auto` is `all` where that fits into memory, else `layers`.
GATHER = ("auto", "all", "layers")

#: That a rank reads for a step.
TOKENS = 2**27
#: Past it, products of two of them are no float32.
LARGEST = 1e15


@dataclass(frozen=True, slots=True)
class Settings:
    """length: tokens of a row. batch: rows of a step, over all ranks. microbatch: rows that a rank computes at once.

    steps: of the optimizer. lr: the highest; warmup: steps up to it; schedule: how it falls, in the last `decay` of the
    steps after the warm-up (wsd), down to `floor` times the highest. clip: of the gradients' norm over all weights,
    None for none. dtype: what layers compute in; weights, their gradients and the optimizer are float32. recompute:
    every layer again in the backward pass. gather: when data ranks gather weights (`sharding.py`). stages: ranks of the
    pipeline; pipeline, virtual: its schedule and stages a rank. tensor: ranks that share each layer. The rest of the
    ranks share the rows.
    """

    length: int
    batch: int = 8
    microbatch: int | None = None
    steps: int = 1000
    lr: float = 1e-3
    warmup: int = 0
    schedule: str = "cosine"
    decay: float = 0.2
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float | None = 1.0
    seed: int = 0
    dtype: str = "fp32"
    parts: str = "auto"
    compile: bool = False
    recompute: bool = False
    gather: str = "auto"
    stages: int = 1
    pipeline: str = "1f1b"
    virtual: int | None = None
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "batch", "steps", "stages", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in ("lr", "floor", "decay", "weight_decay", "eps", "clip"):
            value = getattr(self, name)
            if not (value is None and name == "clip" or 0 <= value <= LARGEST):
                raise ValueError(f"{name} is a number from 0 to {LARGEST:g}, not {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are numbers from 0 to below 1, not {' and '.join(map(str, self.betas))}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seeds are from 0 to {2**32 - 1}, not {self.seed}")
        if self.virtual is not None and self.stages == 1:
            raise ValueError("virtual stages are of a pipeline, which takes more than 1 stage")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"there is no schedule `{self.schedule}`: {', '.join(SCHEDULES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"training computes in {' or '.join(DTYPES)}, not `{self.dtype}`")
        if self.gather not in GATHER:
            raise ValueError(f"weights are gathered as {', '.join(GATHER)}, not `{self.gather}`")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"{self.warmup} steps of warm-up do not fit into {self.steps} steps")

    def rows(self, ranks: int) -> tuple[int, int]:
        """(rows of each of so many data ranks a step, rows of a microbatch). ValueError where rows do not divide."""
        if self.batch % ranks:
            raise ValueError(
                f"a batch of {self.batch} rows cannot be shared by {ranks} data ranks: "
                f"{_nearest(self.batch, ranks)}"
            )
        each = self.batch // ranks
        if each * self.length > TOKENS:
            fewer = TOKENS // self.length * ranks
            raise ValueError(
                f"{each:,} rows of {self.length:,} tokens are more than a rank reads for a step, {TOKENS:,} tokens: "
                + (f"a batch of {fewer:,} would do" if fewer else "shorter rows would do")
            )
        micro = self.microbatch or (each if self.stages == 1 else 1)
        if each % micro:
            fits = [n for n in range(1, each + 1) if each % n == 0]
            near = min(fits, key=lambda n: (abs(n - micro), n))
            raise ValueError(f"{each} rows a rank cannot be cut into microbatches of {micro}: {near} would do")
        return each, micro

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ran(*, dtype: str, parts: str, compile: bool, recompute: bool, tensor: int) -> str:
    """How layers run, in words."""
    more = ("compiled", compile), ("recomputed", recompute), (f"shared by {tensor} ranks", tensor > 1)
    return ", ".join([dtype, f"parts {parts}", *(words for words, true in more if true)])


def _nearest(batch: int, ranks: int) -> str:
    low = batch // ranks * ranks
    return f"{low} or {low + ranks} would do" if low else f"{ranks} would do"
