"""The slot `step`: a whole sublayer for one new token of each row, from residual stream to residual stream.

    step(sublayer, x_BD, position_B, state) -> x_BD        (x_BD is updated in place and returned)

x_BD: float32, or the dtype of the weights. position_B: int64, place of the new token in its document. state: the
branch's tensors, of fixed size, written in place: mamba2 `conv` [B, C, J] (oldest first, of any strides) and `ssm` [B,
H, P, N], as its module keeps them; attention `k`, `v` [B, S, Kv, P] and `used` [B] int64, counted up here (see
`attention.py`). Nothing waits for the device, so a whole model's step can be captured in one CUDA graph, after one
step that compiles the kernels. What is refused is said by `accepts.py`; the maths are those of the kinds' modules and
of `build/sublayer.py`, without the roundings between kernels that were fused.

A plain tensor is the stream between sublayers: the product that ends one adds into it directly (also in float32 from
bfloat16 weights), so a sum handed on to the next norm would save no kernel.

Letters: B batch, D d_model, S slots, and those of the kinds' modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from mambadsl.kinds.attention.kind import rotary_dim
from mambadsl.kinds.attention.rope import attention_factor, frequencies
from mambadsl.kinds.mamba2.kind import d_inner
from mambadsl.parts.triton.decode.attention import attend
from mambadsl.parts.triton.decode.configs import MOST_CONVOLVED_INSIDE
from mambadsl.parts.triton.decode.conv import NO_SHIFT, Shift, convolve
from mambadsl.parts.triton.decode.linear import After, linear_add, norm_linear
from mambadsl.parts.triton.decode.mixer import mix
from mambadsl.parts.triton.decode.norm import RowNorm

State = dict[str, Any]
Step = Callable[[Any, Tensor, Tensor, State], Tensor]


def make_step() -> Step:
    """The slot's function, for every kind in STEPS."""

    def step(sublayer: Any, x_BD: Tensor, position_B: Tensor, state: State) -> Tensor:
        return STEPS[sublayer.mixer_modules()[0].kind.name](sublayer, x_BD, position_B, state)

    return step


#: A way of `configs.PATHS` for both projections, or one for each; by batch unless given.
Path = str | tuple[str, str] | None


def mamba2(sublayer: Any, x_BD: Tensor, position_B: Tensor, state: State, *, path: Path = None) -> Tensor:
    (layer,), branch = sublayer.mixer_modules(), sublayer.branches[0].branch
    f = layer.f
    entry, exit = _ends(path)
    z_scale, x_scale, B_scale, C_scale, _ = f.proj_multipliers
    zx_BE = norm_linear(
        x_BD, layer.in_proj.weight, layer.in_proj.bias, norm=norm_of(sublayer.norm),
        after=After(in_scale=branch.in_multiplier), path=entry,
    )
    shift = Shift(zx_BE, state["conv"], d_inner(f), f.groups * f.d_state, (x_scale, B_scale, C_scale))
    xbc_BC = None
    if x_BD.shape[0] > MOST_CONVOLVED_INSIDE:
        xbc_BC, shift = convolve(shift, layer.conv.weight, layer.conv.bias), NO_SHIFT
    y_BI = mix(
        zx_BE, state["conv"], state["ssm"], conv_weight_CK=layer.conv.weight, conv_bias_C=layer.conv.bias,
        dt_bias_H=layer.dt_bias, A_log_H=layer.A_log, D_H=layer.D, gated=f.gated_norm != "before_gate",
        dt_limit=f.dt_limit, scales=f.proj_multipliers, xbc_BC=xbc_BC,
    )
    norm = None
    if f.gated_norm != "none":
        gate = dict(z_BE=zx_BE, z_scale=z_scale) if f.gated_norm == "before_gate" else {}
        norm = RowNorm(layer.gate_norm.weight, f.norm_eps, groups=f.norm_groups, **gate)
    return linear_add(
        y_BI, layer.out_proj.weight, layer.out_proj.bias, x_BD, norm=norm, out_scale=branch.out_multiplier,
        shift=shift, path=exit,
    )


def attention(sublayer: Any, x_BD: Tensor, position_B: Tensor, state: State, *, path: Path = None) -> Tensor:
    (layer,), branch = sublayer.mixer_modules(), sublayer.branches[0].branch
    f = layer.f
    entry, exit = _ends(path)
    qkv_BE = norm_linear(
        x_BD, layer.qkv_proj.weight, layer.qkv_proj.bias, norm=norm_of(sublayer.norm),
        after=After(in_scale=branch.in_multiplier), path=entry,
    )
    turned, normed = bool(rotary_dim(f)), f.qk_norm.name == "per_head"
    y_BQ = attend(
        qkv_BE, state["k"], state["v"], state["used"], position_B,
        scale=f.head_dim**-0.5 if f.scale is None else f.scale,
        frequency_R=_frequencies(f.rope, rotary_dim(f), x_BD.device) if turned else None,
        rope_factor=attention_factor(f.rope.scaling) if turned else 1.0, window=f.window, softcap=f.softcap,
        key_multiplier=f.key_multiplier, q_norm_P=layer.q_norm.weight if normed else None,
        k_norm_P=layer.k_norm.weight if normed else None, norm_eps=f.qk_norm.eps if normed else 0.0,
    )
    return linear_add(
        y_BQ, layer.o_proj.weight, layer.o_proj.bias, x_BD, out_scale=branch.out_multiplier, path=exit
    )


def mlp(sublayer: Any, x_BD: Tensor, position_B: Tensor, state: State, *, path: Path = None) -> Tensor:
    (layer,), branch = sublayer.mixer_modules(), sublayer.branches[0].branch
    f = layer.f
    entry, exit = _ends(path)
    up = layer.gate_up_proj if f.gated else layer.up_proj
    after = After(f.act, f.gated, f.gate_multiplier, in_scale=branch.in_multiplier)
    h_BF = norm_linear(x_BD, up.weight, up.bias, norm=norm_of(sublayer.norm), after=after, path=entry)
    return linear_add(
        h_BF, layer.down_proj.weight, layer.down_proj.bias, x_BD, out_scale=branch.out_multiplier, path=exit
    )


#: Kind -> its step.
STEPS: dict[str, Step] = {"mamba2": mamba2, "attention": attention, "mlp": mlp}


def _ends(path: Path) -> tuple[str | None, str | None]:
    return path if isinstance(path, tuple) else (path, path)


def norm_of(norm: Any) -> RowNorm | None:
    """A `kinds.norm.Norm` as the kernels take it (rmsnorm or none). ValueError for another."""
    if norm.norm.name == "none":
        return None
    if norm.norm.name != "rmsnorm":
        raise ValueError(f"the decoding kernels have no norm `{norm.norm.name}`")
    return RowNorm(norm.weight, norm.norm.eps, norm.norm.zero_centered)


#: The same tensor at each step.
_frequencies = cache(frequencies)
