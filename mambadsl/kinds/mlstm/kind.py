"""mLSTM: a matrix memory per head behind exponential input gates and sigmoid forget gates.

Beck and others, "xLSTM: Extended Long Short-Term Memory", 2024, and "xLSTM 7B", 2025. Behaviour matches Hugging Face
transformers' xLSTM. H heads, E key_dim, P value_dim.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.fields import Computed, Field, Int, OrWord, Real, chunk_field
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
    Field("value_dim", Int(), 512, "channels of one head's values (P)", "channels"),
    Field(
        "heads", Int(), Computed("d_model // value_dim", lambda v, model: max(1, model.d_model // v.value_dim)),
        "number of heads (H); heads * value_dim is free of d_model",
    ),
    Field(
        "key_dim", Int(), Computed("value_dim // 2", lambda v, model: max(1, v.value_dim // 2)),
        "channels of one head's queries and keys (E)", "channels",
    ),
    chunk_field(64),
    Field(
        "gate_softcap", OrWord("none", Real(above=0)), 15,
        "input and forget gates, before their exponential and sigmoid, stay in (-this, this): this * tanh(g / this)",
    ),
    Field("norm_eps", Real(above=0), 1e-6, "eps of the norm behind the scan"),
    Field("divisor_eps", Real(above=0), 1e-6, "added to what the memory's answer is divided by"),
)


def qk_dim(f: Values) -> int:
    return f.heads * f.key_dim


def v_dim(f: Values) -> int:
    return f.heads * f.value_dim


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    """o, i, f: output, input and forget gates."""
    return ("q", qk_dim(f)), ("k", qk_dim(f)), ("v", v_dim(f)), ("o", v_dim(f)), ("i", f.heads), ("f", f.heads)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """At first the gates say the same whatever they read: input gates next to nothing, forget gates to keep, the later
    the head the more."""
    segments = in_segments(f)
    per_head = dict(fp32=True, decay=False, quantise=False, tp="heads")
    return (
        *linear(
            "in_proj", sum(n for _, n in segments), dims.d_in, segments=segments, tp="out",
            init=Init.of("normal", idle=2 * f.heads),
        ),
        Weight("input_bias", (f.heads,), Init.of("const", value=-10), **per_head),
        Weight("forget_bias", (f.heads,), Init.of("ramp", low=3, high=6), **per_head),
        Weight("head_norm.weight", (v_dim(f),), ONES, decay=False, quantise=False, tp="heads"),
        *linear("out_proj", dims.d_model, v_dim(f), init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """The memory (C), the sum of its keys (n), and the logarithm that both are scaled down by (m)."""
    return (
        State("memory", (f.heads, f.key_dim, f.value_dim), fp32=True),
        State("keys", (f.heads, f.key_dim), fp32=True),
        State("log_scale", (f.heads,), fp32=True),
    )


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections as matrix products; the scan in its chunked form (Q tokens a chunk): scores q.k and their product
    with v inside a chunk, memories in and out of it."""
    causal = Fraction(min(f.chunk, length) + 1, 2)
    inside = 2 * (qk_dim(f) + v_dim(f)) * causal
    memories = 4 * f.heads * f.key_dim * f.value_dim
    proj = matmul(dims.d_in * sum(n for _, n in in_segments(f)), v_dim(f) * dims.d_model)
    return proj + mixing(inside + memories)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, in_proj's output and the scan's output; the rest is computed again."""
    return Saved(dims.d_in + sum(n for _, n in in_segments(f)) + v_dim(f))


def split(f: Values, ranks: int) -> Values | None:
    return divided(f, ranks, "heads")


KIND = Kind(
    name="mlstm",
    example="mlstm(heads=4, key_dim=64, value_dim=64)",
    letter="X",
    color="#e3c7a8",
    doc="mLSTM: a matrix memory behind exponential gates (xLSTM)",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [q | k | v | o | i | f]"),
        Slot("scan", "the matrix memory, with initial and final states"),
        Slot("head_norm", "layer norm of each head and output gate"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2405.04517, arXiv:2503.13427; Hugging Face xLSTMLayer",
    recurrent=True,
)
