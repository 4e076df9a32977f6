"""The recurrent block of Griffin: a short convolution and a real-gated linear recurrent unit, beside a gate.

De and others, "Griffin", 2024. Behaviour matches RecurrentGemma in Hugging Face transformers. I d_inner.
"""

from __future__ import annotations

from mambadsl.kinds.fields import Computed, Field, Flag, Int, Items, Real, chunk_field
from mambadsl.kinds.kind import (
    RESIDUAL,
    ZEROS,
    Dims,
    Flops,
    Init,
    Kind,
    Saved,
    Slot,
    State,
    Weight,
    divided,
    linear,
    matmul,
    mixing,
)
from mambadsl.kinds.mlp.kind import ACT
from mambadsl.kinds.values import Values

FIELDS = (
    Field("d_inner", Int(), Computed("d_model", lambda v, model: model.d_model), "inner width", "channels"),
    Field("blocks", Int(), 1, "the two gates are products with so many square blocks along the diagonal"),
    Field("d_conv", Int(1, 64), 4, "taps of the causal convolution", "tokens"),
    chunk_field(64),
    Field("act", ACT, "gelu_tanh", "activation of the gate beside the recurrence"),
    Field("conv_bias", Flag(), True, "the convolution has a bias"),
    Field("bias", Flag(), True, "in_proj and out_proj have biases"),
    Field("sharpness", Real(above=0), 8, "how much the gate moves a decay: exp(-sharpness * gate * softplus(a_param))"),
    Field(
        "radius", Items(Real(above=0, high=0.999999), 2), (0.9, 0.999),
        "exp(-softplus(a_param)), what a state keeps of itself at a gate of 1 / sharpness, is drawn from this range",
        inert=True,
    ),
)


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    return ("x", f.d_inner), ("y", f.d_inner)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    conv_init = Init.of("uniform", bound=f.d_conv**-0.5)
    per_channel = dict(decay=False, quantise=False, tp="heads")
    conv_bias = Weight("conv.bias", (f.d_inner,), conv_init, **per_channel)
    width = f.d_inner // f.blocks
    square = (f.blocks, width, width)
    gate_init = Init.of("uniform", bound=max(1, width) ** -0.5)
    radius = Init.of("radius", low=f.radius[0], high=f.radius[1])
    return (
        *linear("in_proj", 2 * f.d_inner, dims.d_in, bias=f.bias, segments=in_segments(f), tp="out"),
        Weight("conv.weight", (f.d_inner, f.d_conv), conv_init, quantise=False, tp="heads"),
        *((conv_bias,) if f.conv_bias else ()),
        Weight("input_gate.weight", square, gate_init, quantise=False, tp="heads"),
        Weight("input_gate.bias", (f.d_inner,), ZEROS, **per_channel),
        Weight("decay_gate.weight", square, gate_init, quantise=False, tp="heads"),
        Weight("decay_gate.bias", (f.d_inner,), ZEROS, **per_channel),
        Weight("a_param", (f.d_inner,), radius, fp32=True, **per_channel),
        *linear("out_proj", dims.d_model, f.d_inner, bias=f.bias, init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """The last d_conv - 1 inputs of the convolution, and one number a channel."""
    return State("conv", (f.d_inner, f.d_conv - 1)), State("lru", (f.d_inner,), fp32=True)


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections, gates and convolution as matrix products; a product and a sum for each channel of the state."""
    gates = 2 * f.d_inner * (f.d_inner // f.blocks)
    return matmul(
        dims.d_in * 2 * f.d_inner, gates, f.d_inner * f.d_conv, f.d_inner * dims.d_model
    ) + mixing(2 * f.d_inner)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, [x | y], the convolution's output, both gates and the states."""
    return Saved(dims.d_in + 2 * f.d_inner + 3 * f.d_inner, f.d_inner)


def split(f: Values, ranks: int) -> Values | None:
    return divided(f, ranks, "blocks", "d_inner")


KIND = Kind(
    name="rg_lru",
    example="rg_lru(blocks=4)",
    letter="R",
    color="#f2a488",
    doc="Griffin's recurrent block: convolution, real-gated linear recurrent unit, gate",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [x | y]"),
        Slot("conv", "causal depthwise convolution without activation, its last inputs as state"),
        Slot("scan", "a decaying sum for each channel, with initial and final states"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2402.19427; Hugging Face RecurrentGemmaRecurrentBlock",
    recurrent=True,
)
