"""Mamba-1: a selective state space with its own decay for each channel and state.

Gu and Dao, "Mamba", 2023. Behaviour matches mamba_ssm's Mamba, with the optional norms of dt, B and C
of Jamba (learned) and Falcon Mamba (weightless), and the heads of Zamba: groups of channels with dt, B and C of
their own. N d_state, R dt_rank.
"""

from __future__ import annotations

from mambadsl.kinds.fields import DT_FIELDS, Computed, Field, Flag, Int, OneForm, OneOf, Real, chunk_field
from mambadsl.kinds.kind import (
    ONES,
    RESIDUAL,
    Carried,
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

_EPS = Field("eps", Real(above=0), 1e-6, "eps of the norms")
DT_BC_NORM = OneForm(none=(), weightless=(_EPS,), learned=(_EPS,))

FIELDS = (
    Field("d_inner", Int(), Computed("2 * d_model", lambda v, model: 2 * model.d_model), "inner width", "channels"),
    Field("heads", Int(1, 1024), 1, "heads of d_inner / heads channels, each with dt, B and C of its own (Zamba)"),
    Field("d_state", Int(), 16, "size of the state of one channel (N)"),
    Field("d_conv", Int(1, 64), 4, "taps of the causal convolution", "tokens"),
    Field(
        "dt_rank", Int(), Computed("d_model / 16, rounded up", lambda v, model: -(-model.d_model // 16)),
        "rank of the projection of dt (R)",
    ),
    chunk_field(64),
    Field("conv_bias", Flag(), True, "the convolution has a bias"),
    Field("bias", Flag(), False, "in_proj and out_proj have biases"),
    Field(
        "dt_bc_norm", DT_BC_NORM, DT_BC_NORM.convert_word("none"),
        "RMS norms of dt, B and C before use: learned (Jamba), weightless (Falcon Mamba)",
    ),
    Field("gives", OneOf("none", "scan"), "none", "scan: layers below can take what the scan gives, before the gate"),
    *DT_FIELDS,
)


def head_segments(f: Values) -> tuple[tuple[str, int], ...]:
    """What x_proj gives for one head."""
    return ("dt", f.dt_rank), ("B", f.d_state), ("C", f.d_state)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """x_proj and dt_proj have their heads one after another along the output axis: head h of x_proj reads the
    channels of head h alone."""
    n, r, d = f.d_state, f.dt_rank, f.d_inner
    conv_init = Init.of("uniform", bound=f.d_conv**-0.5)
    small = dict(decay=False, quantise=False)
    table = [
        *linear("in_proj", 2 * d, dims.d_in, bias=f.bias, segments=(("x", d), ("z", d)), tp="out"),
        Weight("conv.weight", (d, f.d_conv), conv_init, quantise=False, tp="heads"),
        *([Weight("conv.bias", (d,), conv_init, tp="heads", **small)] if f.conv_bias else []),
        *linear(
            "x_proj", f.heads * (r + 2 * n), d // f.heads, segments=f.heads * head_segments(f),
            tp="in" if f.heads == 1 else "out",
        ),
    ]
    if f.dt_bc_norm.name == "learned":
        table += [
            Weight("dt_norm.weight", (r,), ONES, **small),
            Weight("b_norm.weight", (n,), ONES, **small),
            Weight("c_norm.weight", (n,), ONES, **small),
        ]
    dt_init = Init.of("dt_bias", low=f.dt_min, high=f.dt_max, floor=f.dt_floor)
    return (
        *table,
        Weight("dt_proj.weight", (d, r), Init.of("uniform", bound=r**-0.5), tp="heads"),
        Weight("dt_proj.bias", (d,), dt_init, fp32=True, tp="heads", **small),
        Weight("A_log", (d, n), Init("a_arange"), fp32=True, tp="heads", **small),
        Weight("D", (d,), ONES, fp32=True, tp="heads", **small),
        *linear("out_proj", dims.d_model, d, bias=f.bias, init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    return State("conv", (f.d_inner, f.d_conv - 1)), State("ssm", (f.d_inner, f.d_state), fp32=True)


def gives(f: Values, dims: Dims) -> tuple[Carried, ...]:
    return (Carried("scan", (f.d_inner,)),) if f.gives == "scan" else ()


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """9 operations for each channel and state: decay, input, update, read-out (the count of the
    selective-scan kernels' authors)."""
    proj = matmul(
        dims.d_in * 2 * f.d_inner, f.d_inner * (f.dt_rank + 2 * f.d_state), f.dt_rank * f.d_inner,
        f.d_inner * dims.d_model, f.d_inner * f.d_conv,
    )
    return proj + mixing(9 * f.d_inner * f.d_state)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, [x | z], dt with B and C, and the scan's output; states are computed again."""
    return Saved(dims.d_in + 2 * f.d_inner + f.heads * (f.dt_rank + 2 * f.d_state) + f.d_inner)


def split(f: Values, ranks: int) -> Values | None:
    """By heads; of one head by channels, which all have a part in dt, B and C."""
    return divided(f, ranks, "d_inner") if f.heads == 1 else divided(f, ranks, "heads", "d_inner")


KIND = Kind(
    name="mamba1",
    example="mamba1(d_inner=512, d_state=16, chunk=64)",
    letter="M",
    color="#a9d4f5",
    doc="Mamba-1: selective state space with a decay per channel and state",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    gives=gives,
    slots=(
        Slot("in_proj", "x_BTD -> [x | z]"),
        Slot("conv", "causal depthwise convolution with silu, its last inputs as state"),
        Slot("scan", "the selective scan of one head, with initial and final states"),
        Slot("out_proj", "back to d_model"),
    ),
    source="arXiv:2312.00752; mamba_ssm Mamba",
    recurrent=True,
)
