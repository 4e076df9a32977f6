"""RWKV-4's channel mixing: a feed-forward layer that also sees the token before, its output behind a sigmoid gate.

Peng and others, "RWKV: Reinventing RNNs for the Transformer Era", 2023. Behaviour matches Hugging Face transformers'
RWKV.
"""

from __future__ import annotations

from mambadsl.kinds.fields import Computed, Field, Int
from mambadsl.kinds.kind import RESIDUAL, Dims, Flops, Init, Kind, Saved, Slot, State, Weight, divided, linear, matmul
from mambadsl.kinds.values import Values

FIELDS = (
    Field("d_ff", Int(), Computed("4 * d_model", lambda v, model: 4 * model.d_model), "hidden width", "channels"),
)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """mix_k, mix_r: the share of the token itself, beside the one before it, that the hidden values and the receptance
    are made of."""
    share = Init.of("shift_share", power=1, rise=0)
    return (
        Weight("mix_k", (dims.d_in,), share, decay=False, quantise=False),
        Weight("mix_r", (dims.d_in,), share, decay=False, quantise=False),
        *linear("up_proj", f.d_ff, dims.d_in, tp="out"),
        *linear("r_proj", dims.d_model, dims.d_in),
        *linear("down_proj", dims.d_model, f.d_ff, init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """The last input."""
    return (State("shift", (dims.d_in,)),)


def flops(f: Values, dims: Dims, length: int) -> Flops:
    return matmul(dims.d_in * f.d_ff, dims.d_in * dims.d_model, f.d_ff * dims.d_model)


def saved(f: Values, dims: Dims) -> Saved:
    """Two mixtures of the input, hidden values before the activation, and both factors of the output."""
    return Saved(2 * dims.d_in + f.d_ff + 2 * dims.d_model)


def split(f: Values, ranks: int) -> Values | None:
    """The receptance is the same on all ranks."""
    return divided(f, ranks, "d_ff")


KIND = Kind(
    name="channel_mix",
    example="channel_mix(d_ff=256)",
    letter="C",
    color="#dfe0a5",
    doc="channel mixing of RWKV-4: a feed-forward layer over a token and the one before it",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("up_proj", "hidden values of each token, mixed with the one before it"),
        Slot("r_proj", "what the receptance is a sigmoid of"),
        Slot("down_proj", "back to d_model"),
    ),
    source="arXiv:2305.13048; Hugging Face RwkvFeedForward",
    recurrent=True,
    local=True,
)
