"""Mamba-3: a state-space layer by the trapezoidal rule, with keys and queries turned by angles that the input moves.

Lahoti and others, "Mamba-3", 2026. Behaviour matches mamba_ssm's Mamba3, of one input and output a head or of several
(`rank`). d_inner = heads * head_dim, free of d_model. H heads, P head_dim, N d_state, G groups, R rank, A angles.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.fields import DT_FIELDS, Computed, Field, Int, OneOf, Real, chunk_field
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
    Field("head_dim", Int(), 64, "channels of one head (P)", "channels"),
    Field(
        "heads", Int(), Computed("2 * d_model // head_dim", lambda v, model: max(1, 2 * model.d_model // v.head_dim)),
        "number of heads (H); heads * head_dim is d_inner, free of d_model",
    ),
    Field("d_state", Int(2), 128, "size of the state of one channel (N)"),
    Field("groups", Int(), 1, "groups of heads that share B and C (G)"),
    Field("rank", Int(1, 64), 1, "how many inputs and outputs a head has, each with a B and a C of its own (R)"),
    Field("rope_fraction", Real(0, 1, above=0), 0.5, "share of d_state that turns, in pairs of neighbours"),
    chunk_field(64),
    Field(
        "gated_norm", OneOf("none", "before_gate"), "none",
        "none: y * silu(z); before_gate: norm(y) * silu(z), the norm of each head by itself",
    ),
    Field("norm_eps", Real(above=0), 1e-5, "eps of the norms of B and C, and of the gated norm"),
    Field("a_floor", Real(above=0), 1e-4, "-A is at least this"),
    *DT_FIELDS,
)


def d_inner(f: Values) -> int:
    return f.heads * f.head_dim


def angles(f: Values) -> int:
    """Pairs of neighbours of B and C that turn."""
    return int(f.d_state * f.rope_fraction) // 2


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    bc = f.rank * f.groups * f.d_state
    per_head = tuple((name, f.heads) for name in ("dt", "A", "trap"))
    return ("z", d_inner(f)), ("x", d_inner(f)), ("B", bc), ("C", bc), *per_head, ("angle", angles(f))


def stretches(f: Values) -> tuple[int, ...]:
    """The segments; of B and C, the groups of each input by themselves."""
    return tuple(
        size for name, n in in_segments(f) for size in (f.rank * (n // f.rank,) if name in "BC" else (n,))
    )


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """Several inputs and outputs a head: rank_x makes them of x, rank_z their gates, rank_out one output of them."""
    segments = in_segments(f)
    per_head = dict(fp32=True, decay=False, quantise=False, tp="heads")
    dt_init = Init.of("dt_bias", low=f.dt_min, high=f.dt_max, floor=f.dt_floor)
    share = Init.of("const", value=1 / f.rank)
    bias, mix = (f.heads, f.rank, f.d_state), (f.heads, f.rank, f.head_dim)
    table = [
        *linear(
            "in_proj", sum(n for _, n in segments), dims.d_in, segments=segments, tp="out", stretches=stretches(f)
        ),
        Weight("dt_bias", (f.heads,), dt_init, **per_head),
        Weight("b_norm.weight", (f.d_state,), ONES, decay=False, quantise=False),
        Weight("c_norm.weight", (f.d_state,), ONES, decay=False, quantise=False),
        Weight("b_bias", bias, ONES, **per_head),
        Weight("c_bias", bias, ONES, **per_head),
        Weight("D", (f.heads,), ONES, **per_head),
    ]
    if f.rank > 1:
        inits = dict(rank_x=share, rank_z=ONES, rank_out=share)
        table += [Weight(name, mix, init, **per_head) for name, init in inits.items()]
    if f.gated_norm != "none":
        table.append(Weight("gate_norm.weight", (d_inner(f),), ONES, decay=False, quantise=False, tp="heads"))
    table += linear("out_proj", dims.d_model, d_inner(f), init=RESIDUAL, tp="in")
    return tuple(table)


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """H x P x N numbers of scan state, the angles so far, and the last token's keys and x (the trapezoid's other
    side)."""
    return (
        State("ssm", (f.heads, f.head_dim, f.d_state), fp32=True),
        State("angle", (f.heads, angles(f)), fp32=True),
        State("k", (f.heads, f.rank, f.d_state)),
        State("x", (f.heads, f.head_dim)),
    )


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections as matrix products; the scan in its chunked form (Q tokens a chunk): scores C.B and their product
    with x inside a chunk, of every input with every output, and states in and out of it."""
    causal = Fraction(min(f.chunk, length) + 1, 2)
    inside = 2 * f.heads * f.rank**2 * (f.d_state + f.head_dim) * causal
    states = 4 * f.rank * d_inner(f) * f.d_state
    proj = matmul(dims.d_in * sum(n for _, n in in_segments(f)), d_inner(f) * dims.d_model)
    return proj + mixing(inside + states)


def saved(f: Values, dims: Dims) -> Saved:
    """Input and in_proj's output; the scan's output before the gate and behind it, the turned keys and queries of all
    heads, and their angles."""
    turned = 2 * f.heads * f.rank * f.d_state
    kept = dims.d_in + sum(n for _, n in in_segments(f)) + 2 * f.rank * d_inner(f) + turned
    return Saved(kept, f.heads * angles(f))


def split(f: Values, ranks: int) -> Values | None:
    """By heads; B and C of fewer groups are on several ranks."""
    return divided(f, ranks, "heads", copied=("groups",))


KIND = Kind(
    name="mamba3",
    example="mamba3(heads=4, head_dim=64, d_state=64, chunk=64)",
    letter="M",
    color="#b4e3fa",
    doc="Mamba-3: selective state space by the trapezoidal rule, with keys that turn",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [z | x | B | C | dt | A | trap | angle]"),
        Slot("scan", "the trapezoidal scan of turned keys and queries, with initial and final states"),
        Slot("gate_norm", "gate and, where asked for, RMS norm of each head"),
        Slot("out_proj", "back to d_model"),
        Slot("core", "scan + gate_norm in one, with the norms, biases and turns before them", ("scan", "gate_norm")),
    ),
    source="arXiv:2603.15569; mamba_ssm Mamba3",
    recurrent=True,
)
