"""Kimi Delta Attention (KDA): a delta rule whose state decays by itself in each channel of the keys.

Kimi Team, "Kimi Linear", 2025. Behaviour matches the linear attention of Kimi Linear and of Ling 3.0. The log decay of
a channel is -exp(A_log) softplus(a + dt_bias), or lower_bound sigmoid(exp(A_log) (a + dt_bias)), where a is projected
from the token. H heads, E key_dim, P value_dim.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.fields import DT_FIELDS, Computed, Field, Flag, Int, Items, OneForm, OrWord, Real, chunk_field
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

DECAY = OneForm(
    softplus=(),
    bounded=(Field("lower_bound", Real(high=0), -5, "log decay of a token that forgets most"),),
)
_RANK = Computed("value_dim", lambda v, model: v.value_dim)

FIELDS = (
    Field("value_dim", Int(), 128, "channels of one head's values (P)", "channels"),
    Field(
        "heads", Int(), Computed("d_model // value_dim", lambda v, model: max(1, model.d_model // v.value_dim)),
        "heads (H); heads * value_dim is free of d_model",
    ),
    Field(
        "key_dim", Int(), Computed("value_dim", lambda v, model: v.value_dim),
        "channels of one head's queries and keys (E)", "channels",
    ),
    Field("d_conv", Int(1, 64), 4, "taps of the causal convolution", "tokens"),
    chunk_field(64),
    Field("conv_bias", Flag(), False, "the convolution has a bias"),
    Field(
        "decay", DECAY, DECAY.convert_word("softplus"),
        "the law of decays: as strong as they come, or never below exp(lower_bound) (Ling 3.0)",
    ),
    Field(
        "decay_rank", OrWord("full", Int()), _RANK, "width between the two projections to the decays; full: one alone",
        "channels",
    ),
    Field(
        "gate_rank", OrWord("full", Int()), _RANK, "width between the two projections to the gate; full: one alone",
        "channels",
    ),
    Field("norm_eps", Real(above=0), 1e-6, "eps of the norm behind the scan"),
    Field("qk_eps", Real(above=0), 1e-6, "added to the squared length of queries and keys before they are normed"),
    *DT_FIELDS,
    Field("a_range", Items(Real(above=0), 2), (1, 16), "initial exp(A_log) is drawn from this range", inert=True),
)


def qk_dim(f: Values) -> int:
    return f.heads * f.key_dim


def v_dim(f: Values) -> int:
    return f.heads * f.value_dim


def conv_dim(f: Values) -> int:
    """Channels of the convolution: q, k and v."""
    return 2 * qk_dim(f) + v_dim(f)


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    """z and a: the gate and the decays themselves, or what is between their two projections."""
    z, a = f.gate_rank or v_dim(f), f.decay_rank or qk_dim(f)
    return ("q", qk_dim(f)), ("k", qk_dim(f)), ("v", v_dim(f)), ("z", z), ("b", f.heads), ("a", a)


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
    if f.decay_rank:
        table += linear("decay_proj", qk_dim(f), f.decay_rank, tp="out")
    if f.gate_rank:
        table += linear("gate_proj", v_dim(f), f.gate_rank, tp="out")
    per_head = dict(fp32=True, decay=False, quantise=False, tp="heads")
    dt_init = Init.of("dt_bias", low=f.dt_min, high=f.dt_max, floor=f.dt_floor)
    a_init = Init.of("a_uniform", low=f.a_range[0], high=f.a_range[1])
    return (
        *table,
        Weight("dt_bias", (qk_dim(f),), dt_init, **per_head),
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
    matrices = [w.elements for w in weights(f, dims) if len(w.shape) == 2]
    causal = Fraction(q + 1, 2)
    pairs = 4 * qk_dim(f) * causal
    solved = 2 * (qk_dim(f) + v_dim(f)) * causal
    inside = 2 * v_dim(f) * causal
    states = 6 * f.heads * f.key_dim * f.value_dim
    return matmul(*matrices) + mixing(pairs + solved + inside + states)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, in_proj's output, decays and gates of two projections, and the scan's output; the rest is computed
    again."""
    second = (qk_dim(f) if f.decay_rank else 0) + (v_dim(f) if f.gate_rank else 0)
    return Saved(dims.d_in + sum(n for _, n in in_segments(f)) + second + v_dim(f))


def split(f: Values, ranks: int) -> Values | None:
    return divided(f, ranks, "heads")


KIND = Kind(
    name="kimi_delta",
    example="kimi_delta(heads=4, key_dim=64, value_dim=64)",
    letter="K",
    color="#a9c3a0",
    doc="Kimi Delta Attention: linear attention by a delta rule with a decay per channel",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [q | k | v | z | b | a]"),
        Slot("conv", "causal depthwise convolution with silu, its last inputs as state"),
        Slot("scan", "the delta rule with a decay per channel, with initial and final states"),
        Slot("gate_norm", "RMS norm of each head and sigmoid gate"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2510.26692; Hugging Face KimiLinearDeltaAttention, BailingHybridDeltaAttention",
    recurrent=True,
)
