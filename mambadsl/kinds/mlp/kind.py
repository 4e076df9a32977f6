"""Feed-forward layer: down(act(up(x))), or gated, down(act(gate(x)) * up(x))."""

from __future__ import annotations

from mambadsl.kinds.fields import Computed, Field, Flag, Int, OneOf, Real
from mambadsl.kinds.kind import RESIDUAL, STEP, Dims, Flops, Kind, Saved, Slot, State, Weight, divided, linear, matmul
from mambadsl.kinds.values import Values

ACT = OneOf("silu", "gelu", "gelu_tanh", "relu2", "relu")

FIELDS = (
    Field("d_ff", Int(), Computed("4 * d_model", lambda v, model: 4 * model.d_model), "hidden width", "channels"),
    Field("act", ACT, "silu", "activation; relu2 is relu(x) ** 2"),
    Field("gated", Flag(), False, "act(gate(x)) * up(x) instead of act(up(x))"),
    Field("bias", Flag(), False, "the projections have biases"),
    Field("gate_multiplier", Real(), 1, "scale of the gate before the activation (Falcon-H1)"),
)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    if f.gated:
        segments = ("gate", f.d_ff), ("up", f.d_ff)
        up = linear("gate_up_proj", 2 * f.d_ff, dims.d_in, bias=f.bias, segments=segments, tp="out")
    else:
        up = linear("up_proj", f.d_ff, dims.d_in, bias=f.bias, tp="out")
    return (*up, *linear("down_proj", dims.d_model, f.d_ff, bias=f.bias, init=RESIDUAL, tp="in"))


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    return ()


def flops(f: Values, dims: Dims, length: int) -> Flops:
    return matmul((2 if f.gated else 1) * dims.d_in * f.d_ff, f.d_ff * dims.d_model)


def saved(f: Values, dims: Dims) -> Saved:
    """Input and the hidden values before the activation; the activation is computed again."""
    return Saved(dims.d_in + (2 if f.gated else 1) * f.d_ff)


def split(f: Values, ranks: int) -> Values | None:
    return divided(f, ranks, "d_ff")


KIND = Kind(
    name="mlp",
    example="mlp(d_ff=512, gated=true)",
    letter="F",
    color="#b8e0b0",
    doc="feed-forward layer, gated or not",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("up_proj", "x_BTD -> hidden (gate and up in one where gated)"),
        Slot("act", "activation, and the product with the gate"),
        Slot("down_proj", "back to d_model"),
        STEP,
    ),
    source="gated: arXiv:2002.05202; relu2: arXiv:2109.08668",
)
