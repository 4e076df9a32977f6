"""Gated DeltaNet: a matrix state per head that decays, and is corrected by what it would have answered.

Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024. Behaviour matches the linear attention of Qwen3-Next, Qwen3.5
and OLMo Hybrid. H heads (of values), K key_heads, E key_dim, P value_dim.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.fields import DT_FIELDS, Computed, Field, Flag, Int, Items, Real, chunk_field
from mambadsl.kinds.kind import (
    ONES,
    RESIDUAL,
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
from mambadsl.kinds.values import Values

FIELDS = (
    Field("value_dim", Int(), 128, "channels of one head's values (P)", "channels"),
    Field(
        "heads", Int(),
        Computed("2 * d_model // value_dim", lambda v, model: max(1, 2 * model.d_model // v.value_dim)),
        "heads of values (H); heads * value_dim is free of d_model",
    ),
    Field(
        "key_heads", Int(), Computed("heads", lambda v, model: v.heads),
        "heads of queries and keys (K); each serves heads / key_heads heads of values",
    ),
    Field("key_dim", Int(), 128, "channels of one head's queries and keys (E)", "channels"),
    Field("d_conv", Int(1, 64), 4, "taps of the causal convolution", "tokens"),
    chunk_field(64),
    Field("conv_bias", Flag(), False, "the convolution has a bias"),
    Field(
        "negative_eigenvalues", Flag(), False,
        "beta goes up to 2 instead of 1, so that what a key reads may change its sign (OLMo Hybrid)",
    ),
    Field("norm_eps", Real(above=0), 1e-6, "eps of the norm behind the scan"),
    Field("qk_eps", Real(above=0), 1e-6, "added to the squared length of queries and keys before they are normed"),
    *DT_FIELDS,
    Field("a_range", Items(Real(above=0), 2), (0.01, 16), "initial -A is drawn from this range", inert=True),
)


def qk_dim(f: Values) -> int:
    return f.key_heads * f.key_dim


def v_dim(f: Values) -> int:
    return f.heads * f.value_dim


def conv_dim(f: Values) -> int:
    """Channels of the convolution: q, k and v."""
    return 2 * qk_dim(f) + v_dim(f)


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    return ("q", qk_dim(f)), ("k", qk_dim(f)), ("v", v_dim(f)), ("z", v_dim(f)), ("b", f.heads), ("a", f.heads)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    segments = in_segments(f)
    conv_init = Init.of("uniform", bound=f.d_conv**-0.5)
    table = [
        *linear("in_proj", sum(n for _, n in segments), dims.d_in, segments=segments, tp="out"),
        Weight("conv.weight", (conv_dim(f), f.d_conv), conv_init, segments[:3], quantise=False, tp="heads"),
    ]
    if f.conv_bias:
        table.append(
            Weight("conv.bias", (conv_dim(f),), conv_init, segments[:3], decay=False, quantise=False, tp="heads")
        )
    per_head = dict(fp32=True, decay=False, quantise=False, tp="heads")
    dt_init = Init.of("dt_bias", low=f.dt_min, high=f.dt_max, floor=f.dt_floor)
    a_init = Init.of("a_uniform", low=f.a_range[0], high=f.a_range[1])
    return (
        *table,
        Weight("dt_bias", (f.heads,), dt_init, **per_head),
        Weight("A_log", (f.heads,), a_init, **per_head),
        Weight("gate_norm.weight", (f.value_dim,), ONES, decay=False, quantise=False),
        *linear("out_proj", dims.d_model, v_dim(f), init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """The last d_conv - 1 inputs of the convolution, and H x E x P numbers that keys address."""
    return (
        State("conv", (conv_dim(f), f.d_conv - 1)),
        State("delta", (f.heads, f.key_dim, f.value_dim), fp32=True),
    )


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections and convolution as matrix products; the scan in its chunked form (Q tokens a chunk): products of
    keys with keys and with queries, the triangular system for the corrections, their sums, and three products with
    the state."""
    q = min(f.chunk, length)
    proj = matmul(dims.d_in * sum(n for _, n in in_segments(f)), v_dim(f) * dims.d_model)
    conv = matmul(conv_dim(f) * f.d_conv)
    causal = Fraction(q + 1, 2)
    pairs = 4 * f.heads * f.key_dim * causal
    solved = 2 * f.heads * (f.key_dim + f.value_dim) * causal
    inside = 2 * v_dim(f) * causal
    states = 6 * f.heads * f.key_dim * f.value_dim
    return proj + conv + mixing(pairs + solved + inside + states)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, in_proj's output and the scan's output; the rest is computed again."""
    return Saved(dims.d_in + sum(n for _, n in in_segments(f)) + v_dim(f))


def split(f: Values, ranks: int) -> Values | None:
    return divided(f, ranks, "heads", copied=("key_heads",))


KIND = Kind(
    name="gated_delta_net",
    example="gated_delta_net(heads=4, key_heads=2, key_dim=64, value_dim=64)",
    letter="D",
    color="#c7b8ea",
    doc="Gated DeltaNet: linear attention by a decaying delta rule",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [q | k | v | z | b | a]"),
        Slot("conv", "causal depthwise convolution with silu, its last inputs as state"),
        Slot("scan", "the gated delta rule, with initial and final states"),
        Slot("gate_norm", "RMS norm of each head and gate"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2412.06464; Hugging Face Qwen3NextGatedDeltaNet",
    recurrent=True,
)
