"""Lightning attention: linear attention without a softmax, each head with a decay of its own that nothing moves.

Qin and others, "Lightning Attention-2", 2024. Behaviour matches MiniMax-Text-01 and MiniMax-M1 in Hugging Face
transformers. H heads, P head_dim.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.fields import Computed, Field, Int, Real, chunk_field
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
    Field("head_dim", Int(), 128, "channels of one head's queries, keys and values (P)", "channels"),
    Field(
        "heads", Int(), Computed("d_model // head_dim", lambda v, model: max(1, model.d_model // v.head_dim)),
        "number of heads (H); heads * head_dim is free of d_model",
    ),
    chunk_field(256),
    Field("norm_eps", Real(above=0), 1e-6, "eps of the norm behind the scan"),
)


def d_inner(f: Values) -> int:
    return f.heads * f.head_dim


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    return tuple((name, d_inner(f)) for name in "qkvz")


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """slope: a head's state keeps exp(-slope) of itself a token; set by head and depth, never trained."""
    return (
        *linear("in_proj", 4 * d_inner(f), dims.d_in, segments=in_segments(f), tp="out"),
        Weight(
            "slope", (f.heads,), Init("slopes"), fp32=True, decay=False, trained=False, quantise=False, tp="heads"
        ),
        Weight("gate_norm.weight", (d_inner(f),), ONES, decay=False, quantise=False, tp="heads"),
        *linear("out_proj", dims.d_model, d_inner(f), init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """H x P x P numbers: the decayed sum of values times keys."""
    return (State("kv", (f.heads, f.head_dim, f.head_dim), fp32=True),)


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections as matrix products; the scan in its chunked form (Q tokens a chunk): scores q.k and their product
    with v inside a chunk, states in and out of it."""
    causal = Fraction(min(f.chunk, length) + 1, 2)
    inside = 4 * d_inner(f) * causal
    states = 4 * d_inner(f) * f.head_dim
    return matmul(dims.d_in * 4 * d_inner(f), d_inner(f) * dims.d_model) + mixing(inside + states)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, in_proj's output and the scan's output; the rest is computed again."""
    return Saved(dims.d_in + 5 * d_inner(f))


def split(f: Values, ranks: int) -> Values | None:
    """By heads; the norm over all of them is cut."""
    return divided(f, ranks, "heads")


KIND = Kind(
    name="lightning",
    example="lightning(heads=4, head_dim=64, chunk=64)",
    letter="L",
    color="#f5e0b0",
    doc="lightning attention: linear attention with a fixed decay for each head (MiniMax)",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [q | k | v | z]"),
        Slot("scan", "the SSD scan with keys as B, queries as C and steps of 1, initial and final states included"),
        Slot("gate_norm", "RMS norm over all heads and gate"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2401.04658; Hugging Face MiniMaxLightningAttention",
    recurrent=True,
)
