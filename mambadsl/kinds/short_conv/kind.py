"""A gated short convolution: a few taps per channel between two products with gates.

As the `conv` layers of LFM2 (Liquid AI, 2025): no activation, no state but the last inputs. I d_inner.
"""

from __future__ import annotations

from mambadsl.kinds.fields import Computed, Field, Flag, Int
from mambadsl.kinds.kind import RESIDUAL, Dims, Flops, Init, Kind, Saved, Slot, State, Weight, divided, linear, matmul
from mambadsl.kinds.values import Values

FIELDS = (
    Field("d_inner", Int(), Computed("d_model", lambda v, model: model.d_model), "inner width", "channels"),
    Field("d_conv", Int(1, 64), 3, "taps of the causal convolution", "tokens"),
    Field("conv_bias", Flag(), False, "the convolution has a bias"),
    Field("bias", Flag(), False, "in_proj and out_proj have biases"),
)


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    return ("B", f.d_inner), ("C", f.d_inner), ("x", f.d_inner)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    conv_init = Init.of("uniform", bound=f.d_conv**-0.5)
    bias = Weight("conv.bias", (f.d_inner,), conv_init, decay=False, quantise=False, tp="heads")
    return (
        *linear("in_proj", 3 * f.d_inner, dims.d_in, bias=f.bias, segments=in_segments(f), tp="out"),
        Weight("conv.weight", (f.d_inner, f.d_conv), conv_init, quantise=False, tp="heads"),
        *((bias,) if f.conv_bias else ()),
        *linear("out_proj", dims.d_model, f.d_inner, bias=f.bias, init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """The last d_conv - 1 inputs of the convolution."""
    return (State("conv", (f.d_inner, f.d_conv - 1)),)


def flops(f: Values, dims: Dims, length: int) -> Flops:
    return matmul(dims.d_in * 3 * f.d_inner, f.d_inner * f.d_conv, f.d_inner * dims.d_model)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, [B | C | x] and the convolution's output; the products are computed again."""
    return Saved(dims.d_in + 3 * f.d_inner + f.d_inner)


def split(f: Values, ranks: int) -> Values | None:
    return divided(f, ranks, "d_inner")


KIND = Kind(
    name="short_conv",
    example="short_conv(d_conv=3)",
    letter="C",
    color="#f3e58b",
    doc="gated short convolution (LFM2)",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [B | C | x]"),
        Slot("conv", "causal depthwise convolution without activation, its last inputs as state"),
        Slot("out_proj", "back to d_model"),
    ),
    source="Hugging Face Lfm2ShortConv",
    recurrent=True,
    local=True,
)
