"""One projection: what it reads -> d_model. Zamba brings what its shared block gives to each use with one."""

from __future__ import annotations

from mambadsl.kinds.fields import Field, Flag
from mambadsl.kinds.kind import RESIDUAL, Dims, Flops, Kind, Saved, Slot, State, Weight, linear, matmul
from mambadsl.kinds.values import Values

FIELDS = (Field("bias", Flag(), False, "the projection has a bias"),)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    return linear("out_proj", dims.d_model, dims.d_in, bias=f.bias, init=RESIDUAL, tp="in")


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    return ()


def flops(f: Values, dims: Dims, length: int) -> Flops:
    return matmul(dims.d_in * dims.d_model)


def saved(f: Values, dims: Dims) -> Saved:
    """Its input."""
    return Saved(dims.d_in)


KIND = Kind(
    name="linear",
    example="linear(bias=true)",
    letter="L",
    color="#dcdcdc",
    doc="one projection to d_model",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    slots=(Slot("out_proj", "x_BTD -> d_model"),),
    source="Hugging Face ZambaHybridLayer.linear",
)
