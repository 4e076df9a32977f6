"""A gated memory unit: what a scan above gave, gated by this layer's own input. Nothing is mixed along the sequence.

As in the upper half of SambaY (arXiv:2507.06607), where all share the scan of one Mamba layer. I d_inner.
"""

from __future__ import annotations

from mambadsl.kinds.fields import Computed, Field, Flag, Int
from mambadsl.kinds.kind import RESIDUAL, Carried, Dims, Flops, Kind, Saved, Slot, State, Weight, linear, matmul
from mambadsl.kinds.mlp.kind import ACT
from mambadsl.kinds.values import Values

FIELDS = (
    Field(
        "d_inner", Int(), Computed("2 * d_model", lambda v, model: 2 * model.d_model),
        "width of what it takes, as the layer that gives it has it", "channels",
    ),
    Field("act", ACT, "silu", "activation of the gate"),
    Field("bias", Flag(), False, "in_proj and out_proj have biases"),
)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    return (
        *linear("in_proj", f.d_inner, dims.d_in, bias=f.bias, tp="out"),
        *linear("out_proj", dims.d_model, f.d_inner, bias=f.bias, init=RESIDUAL, tp="in"),
    )


def takes(f: Values, dims: Dims) -> tuple[Carried, ...]:
    return (Carried("scan", (f.d_inner,)),)


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    return ()


def flops(f: Values, dims: Dims, length: int) -> Flops:
    return matmul(dims.d_in * f.d_inner, f.d_inner * dims.d_model)


def saved(f: Values, dims: Dims) -> Saved:
    """Input and the gate before its activation; the product is computed again, and what it takes is its giver's."""
    return Saved(dims.d_in + f.d_inner)


KIND = Kind(
    name="gmu",
    example="[mamba1(d_inner=512, d_state=16, chunk=64, gives=scan) gmu(d_inner=512)]",
    letter="U",
    color="#d9bfe3",
    doc="gated memory unit: gates what a scan above gave (SambaY)",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    slots=(
        Slot("in_proj", "x_BTD -> the gate"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2507.06607",
    takes=takes,
)
