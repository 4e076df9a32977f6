"""One place of the chain that the planner cuts: the embedding, a layer, the head.

In: numbers from a cost model or a profile. Out: frozen `Unit`s, in chain order. Times are seconds for one
microbatch, bytes are bytes on one device. Refuses negative and non-finite numbers (`ValueError`): they come
from code, not from a model file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mambadsl.text.source import Span

#: Training bytes of a parameter: bf16 weight 2, fp32 gradient 4, fp32 master weight and Adam's moments 12.
TRAINING_BYTES_PER_PARAM = 2 + 4 + 12

_NUMBERS = (
    "forward_s", "backward_input_s", "backward_weight_s", "static_bytes", "activation_bytes",
    "out_bytes", "working_bytes", "shared_bytes", "params", "shared_params",
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of the chain.

    forward_s, backward_input_s, backward_weight_s: the backward pass of a microbatch is the sum of the two,
    the input half first; a recomputed layer has its second forward inside `backward_input_s`.
    static_bytes: weights, gradients and optimizer state that belong to this unit alone.
    activation_bytes: kept from the forward of a microbatch to the end of its backward.
    working_bytes: needed only while the unit runs (a recomputed layer's inside, fp32 logits).
    out_bytes: every tensor that crosses if the chain is cut after this unit: the residual stream and what
    else is carried past it.
    can_cut_after: False where a crossing tensor cannot be sent. cut_after: the text has a `|` here.
    owner, shared_bytes, shared_params: weights used by several units (a shared block, a tied embedding):
    paid once in each stage that has a unit of this owner. params: the unit's own weights, without those.
    kind and label: what tables show (`mamba2`, `M`). detail: a noun phrase for sentences
    ("131,072 x 4,096 logits"). span: the place in the model file.
    """

    path: str
    kind: str
    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    label: str = ""
    static_bytes: int = 0
    activation_bytes: int = 0
    working_bytes: int = 0
    out_bytes: int = 0
    can_cut_after: bool = True
    cut_after: bool = False
    owner: str | None = None
    shared_bytes: int = 0
    params: int = 0
    shared_params: int = 0
    detail: str = ""
    span: Span | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{self.path}: {name} must be finite and not negative, not {value!r}")

    @property
    def backward_s(self) -> float:
        return self.backward_input_s + self.backward_weight_s

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s
