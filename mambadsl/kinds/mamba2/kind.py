"""Mamba-2: a state-space layer with one decay per head (SSD).

Dao and Gu, "Transformers are SSMs", 2024. Behaviour matches mamba_ssm's Mamba2 (the fused path's
grouping of the gated norm) and the Mamba-2 layers of Nemotron-H, Bamba, Falcon-H1 and Granite 4 H.
d_inner = heads * head_dim, free of d_model. H heads, P head_dim, N d_state, G groups.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.fields import DT_FIELDS, Computed, Field, Flag, Int, Items, OneOf, OrWord, Real, chunk_field
from mambadsl.kinds.kind import (
    ONES,
    RESIDUAL,
    STEP,
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


def d_inner(f: Values) -> int:
    return f.heads * f.head_dim


def conv_dim(f: Values) -> int:
    """Channels of the convolution: x, B and C."""
    return d_inner(f) + 2 * f.groups * f.d_state


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    bc = f.groups * f.d_state
    return ("z", d_inner(f)), ("x", d_inner(f)), ("B", bc), ("C", bc), ("dt", f.heads)


FIELDS = (
    Field("head_dim", Int(), 64, "channels of one head (P)", "channels"),
    Field(
        "heads", Int(), Computed("2 * d_model // head_dim", lambda v, model: max(1, 2 * model.d_model // v.head_dim)),
        "number of heads (H); heads * head_dim is d_inner, free of d_model",
    ),
    Field("d_state", Int(), 128, "size of the state of one channel (N)"),
    Field("groups", Int(), 1, "groups of heads that share B and C (G)"),
    Field("d_conv", Int(1, 64), 4, "taps of the causal convolution", "tokens"),
    chunk_field(256),
    Field("conv_bias", Flag(), True, "the convolution has a bias"),
    Field("bias", Flag(), False, "in_proj and out_proj have biases"),
    Field(
        "gated_norm", OneOf("after_gate", "before_gate", "none"), "after_gate",
        "after_gate: norm(y * silu(z)); before_gate: norm(y) * silu(z); none: y * silu(z)",
    ),
    Field(
        "norm_groups", Int(), Computed("groups", lambda v, model: v.groups),
        "groups of channels that the gated norm works on",
    ),
    Field("norm_eps", Real(above=0), 1e-5, "eps of the gated norm"),
    Field(
        "dt_limit", Items(OrWord("inf", Real(0)), 2), (0, None),
        "dt is clamped to this range after softplus; `inf` (None in Python): no upper limit",
    ),
    *DT_FIELDS,
    Field("a_range", Items(Real(above=0), 2), (1, 16), "initial -A is drawn from this range", inert=True),
    Field(
        "proj_multipliers", Items(Real(), 5), (1, 1, 1, 1, 1),
        "scales of z, x, B, C and dt after in_proj (Falcon-H1)",
    ),
)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    segments = in_segments(f)
    conv_segments = segments[1:4]
    bound = f.d_conv**-0.5
    conv_init = Init.of("uniform", bound=bound)
    table = [
        *linear("in_proj", sum(n for _, n in segments), dims.d_in, bias=f.bias, segments=segments, tp="out"),
        Weight("conv.weight", (conv_dim(f), f.d_conv), conv_init, conv_segments, quantise=False, tp="heads"),
    ]
    if f.conv_bias:
        table.append(
            Weight("conv.bias", (conv_dim(f),), conv_init, conv_segments, decay=False, quantise=False, tp="heads")
        )
    dt_init = Init.of("dt_bias", low=f.dt_min, high=f.dt_max, floor=f.dt_floor)
    a_init = Init.of("a_uniform", low=f.a_range[0], high=f.a_range[1])
    per_head = dict(fp32=True, decay=False, quantise=False, tp="heads")
    table += [
        Weight("dt_bias", (f.heads,), dt_init, **per_head),
        Weight("A_log", (f.heads,), a_init, **per_head),
        Weight("D", (f.heads,), ONES, **per_head),
    ]
    if f.gated_norm != "none":
        table.append(Weight("gate_norm.weight", (d_inner(f),), ONES, decay=False, quantise=False, tp="heads"))
    table += linear("out_proj", dims.d_model, d_inner(f), bias=f.bias, init=RESIDUAL, tp="in")
    return tuple(table)


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """The last d_conv - 1 inputs of the convolution, and H x P x N numbers of scan state."""
    return (
        State("conv", (conv_dim(f), f.d_conv - 1), first_innermost=True),
        State("ssm", (f.heads, f.head_dim, f.d_state), fp32=True),
    )


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections and convolution as matrix products; the scan in its chunked form (Q tokens a chunk):
    scores C.B and their product with x inside a chunk, states in and out of it."""
    q = min(f.chunk, length)
    proj = matmul(dims.d_in * sum(n for _, n in in_segments(f)), d_inner(f) * dims.d_model)
    conv = matmul(conv_dim(f) * f.d_conv)
    causal = Fraction(q + 1, 2)
    scores = 2 * f.groups * f.d_state * causal
    inside = 2 * d_inner(f) * causal
    states = 4 * d_inner(f) * f.d_state
    return proj + conv + mixing(scores + inside + states)


def saved(f: Values, dims: Dims) -> Saved:
    """in_proj's output and the scan's output (the fused op computes the rest again), and the input. A norm whose groups
    are cut is no part of that op: what the scan reads is kept too."""
    narrow = dims.d_in + sum(n for _, n in in_segments(f)) + d_inner(f)
    return Saved(narrow + conv_dim(f), f.heads) if norm_ranks(f) > 1 else Saved(narrow)


def norm_ranks(f: Values) -> int:
    """How many ranks have channels of one group of the norm: of a rank's part, `norm_groups` may be 1/n."""
    return f.norm_groups.denominator


def split(f: Values, ranks: int) -> Values | None:
    """By heads; B and C of fewer groups are on several ranks, a group of the norm is cut."""
    normed = () if f.gated_norm == "none" else ("norm_groups",)
    return divided(f, ranks, "heads", copied=("groups",), cut=normed)


KIND = Kind(
    name="mamba2",
    example="mamba2(heads=8, head_dim=64, d_state=64, groups=2, chunk=64)",
    letter="M",
    color="#7fc8f8",
    doc="Mamba-2: selective state space with one decay per head (SSD)",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [z | x | B | C | dt]"),
        Slot("conv", "causal depthwise convolution with silu, its last inputs as state"),
        Slot("scan", "the SSD scan, with initial and final states"),
        Slot("gate_norm", "gate and grouped RMS norm"),
        Slot("out_proj", "back to d_model"),
        Slot("core", "conv + scan + gate_norm in one", covers=("conv", "scan", "gate_norm")),
        STEP,
    ),
    source="arXiv:2405.21060; mamba_ssm Mamba2",
    recurrent=True,
)
