"""RWKV-4's time mixing: for each channel a mean of past values, weighted by exp(key) and by how long ago they were.

Peng and others, "RWKV: Reinventing RNNs for the Transformer Era", 2023. Behaviour matches Hugging Face transformers'
RWKV. I d_inner.
"""

from __future__ import annotations

from mambadsl.kinds.fields import Computed, Field, Int, chunk_field
from mambadsl.kinds.kind import (
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
    Field("d_inner", Int(), Computed("d_model", lambda v, model: model.d_model), "inner width (I)", "channels"),
    chunk_field(64),
)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """mix_k, mix_v, mix_r: the share of the token itself, beside the one before it, that k, v and r are made of.
    time_decay: a token on, exp(-exp(it)) of a weight is left; time_first: what the newest token's key has more."""
    small = dict(decay=False, quantise=False)
    per_channel = dict(fp32=True, tp="heads", **small)
    return (
        Weight("mix_k", (dims.d_in,), Init.of("shift_share", power=1, rise=0), **small),
        Weight("mix_v", (dims.d_in,), Init.of("shift_share", power=1, rise=0.3), **small),
        Weight("mix_r", (dims.d_in,), Init.of("shift_share", power=0.5, rise=0), **small),
        *(weight for name in "kvr" for weight in linear(f"{name}_proj", f.d_inner, dims.d_in, tp="out")),
        Weight("time_decay", (f.d_inner,), Init("decay_speeds"), **per_channel),
        Weight("time_first", (f.d_inner,), Init("zigzag"), **per_channel),
        *linear("out_proj", dims.d_model, f.d_inner, init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """The last input; the weighted sum of values, the sum of weights (0: no token yet), and the logarithm that both are
    scaled down by."""
    sums = (State(name, (f.d_inner,), fp32=True) for name in ("values", "weight", "log_scale"))
    return State("shift", (dims.d_in,)), *sums


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections as matrix products; two sums, a decay of each and the newest token for each channel."""
    return matmul(3 * dims.d_in * f.d_inner, f.d_inner * dims.d_model) + mixing(10 * f.d_inner)


def saved(f: Values, dims: Dims) -> Saved:
    """Three mixtures of the input; k, v, r and the scan's output."""
    return Saved(3 * dims.d_in + 4 * f.d_inner)


def split(f: Values, ranks: int) -> Values | None:
    return divided(f, ranks, "d_inner")


KIND = Kind(
    name="wkv4",
    example="wkv4(d_inner=64)",
    letter="W",
    color="#b5d3c2",
    doc="time mixing of RWKV-4: an exponentially weighted mean for each channel",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("k_proj", "keys of each token, mixed with the one before it"),
        Slot("v_proj", "values of the same"),
        Slot("r_proj", "what the receptance is a sigmoid of"),
        Slot("scan", "the weighted mean of each channel, with initial and final states"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2305.13048; Hugging Face RwkvSelfAttention",
    recurrent=True,
)
