"""Mamba-2's mixer for one token a row, in one kernel: convolution, silu, dt, state update, D, and the gate.

In: in_proj's output zx_BE = [z | x | B | C | dt], the layer's small weights, its states; or [x | B | C] already
convolved (`conv.convolve`), which large batches do once instead of in every program of a head. Out: y_BI in float32
(gated, not normed), and the scan's state [B, H, P, N] updated in place, float32 or bfloat16. The convolution's state
is read only: programs share B and C. Definition: `kinds/mamba2/module.py`, `core`. Refuses (ValueError) head_dim and
d_state that are no powers of two.

Letters: B batch, H heads, P head_dim, I = H * P, N d_state, G groups, S = G * N, C = I + 2S channels, E = I + C + H.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.decode.configs import MIXER, Scan, for_batch
from mambadsl.parts.triton.decode.conv import past_sum
from mambadsl.parts.triton.decode.device import begin, launch_options, prefetch, silu
from mambadsl.parts.triton.softplus import softplus

#: Largest batch for which the convolution's past is read before the kernel that wrote zx ends.
MOST_EARLY = 8


def mix(
    zx_BE: Tensor, conv_BCJ: Tensor, ssm_BHPN: Tensor, *, conv_weight_CK: Tensor, conv_bias_C: Tensor | None,
    dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor, gated: bool = True,
    dt_limit: tuple[float, float | None] = (0, None), scales: tuple[float, ...] = (1, 1, 1, 1, 1),
    xbc_BC: Tensor | None = None, tile: Scan | None = None,
) -> Tensor:
    """y_BI float32, times silu(z) where `gated`; ssm_BHPN is updated. scales: of z, x, B, C and dt. xbc_BC: what
    `convolve` gave, the convolution's state having moved on."""
    (B, H, P, N), (C, taps) = ssm_BHPN.shape, conv_weight_CK.shape
    if P & (P - 1) or N & (N - 1):
        raise ValueError(f"head_dim {P} and d_state {N} must be powers of two")
    if not (ssm_BHPN.is_contiguous() and conv_weight_CK.is_contiguous()):
        raise ValueError("the scan's state and the convolution's weight must be contiguous")
    S = (C - H * P) // 2
    tile = tile or for_batch(MIXER.get(ssm_BHPN.element_size(), MIXER[4]), B)
    # Wider states than the table's in fewer rows, for registers.
    rows = min(max(1, tile.rows * 128 // max(128, N)), P)
    y_BI = torch.empty((B, H * P), dtype=torch.float32, device=zx_BE.device)
    low, high = dt_limit
    _mixer_kernel[(P // rows, H, B)](
        zx_BE, conv_BCJ, xbc_BC, ssm_BHPN, y_BI, conv_weight_CK, conv_bias_C, dt_bias_H, A_log_H, D_H,
        zx_BE.stride(0), *conv_BCJ.stride(), H, H * N // S, S, C, float(low), math.inf if high is None else float(high),
        *map(float, scales), GATED=gated, BIAS=conv_bias_C is not None, TAPS=taps, P=P, N=N,
        ROWS=rows, EARLY=xbc_BC is None and B <= MOST_EARLY, CONVOLVED=xbc_BC is not None, AHEAD=tile.ahead,
        num_warps=tile.warps, maxnreg=tile.registers, **launch_options(zx_BE),
    )
    return y_BI


@triton.jit
def _mixer_kernel(
    ZX, CONV, XBC, SSM, Y, W, BIAS_C, DT_BIAS, A_LOG, D, zx_stride, conv_row, conv_channel, conv_tap, H,
    heads_per_group, S, C, dt_low, dt_high, z_scale, x_scale, B_scale, C_scale, dt_scale,
    GATED: tl.constexpr, BIAS: tl.constexpr, TAPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, EARLY: tl.constexpr, CONVOLVED: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    h = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    n = tl.arange(0, N)
    I = H * P
    place = SSM + ((row * H + h) * P + first) * N + (r[:, None] * N + n[None, :])
    x_channel = h * P + first + r
    b_channel = I + (h // heads_per_group) * N + n
    c_channel = b_channel + S
    # States are of the step before this one, so they and weights can be read while the kernel before this one ends.
    # The convolution's past in many registers costs larger batches more than it saves.
    state = tl.load(place, eviction_policy="evict_first").to(tl.float32)
    if PDL and AHEAD > 0:
        tiles: tl.constexpr = P // ROWS
        later = (row * H + h) * tiles + tl.program_id(0) + AHEAD
        if later < tl.num_programs(2) * H * tiles:
            line: tl.constexpr = 1024 // SSM.dtype.element_ty.primitive_bitwidth
            prefetch(SSM + later * (ROWS * N) + tl.arange(0, ROWS * N // line) * line)
    dt_bias = tl.load(DT_BIAS + h).to(tl.float32)
    A = -tl.exp(tl.load(A_LOG + h).to(tl.float32))
    d = tl.load(D + h).to(tl.float32)
    new = ZX + row * zx_stride + I
    if CONVOLVED:
        begin(PDL)
        x = tl.load(XBC + row * C + x_channel)
        b = tl.load(XBC + row * C + b_channel)
        c = tl.load(XBC + row * C + c_channel)
    else:
        past = CONV + row * conv_row
        if not EARLY:
            begin(PDL)
        x, x_weight = past_sum(past, W, BIAS_C, x_channel, None, conv_channel, conv_tap, BIAS, TAPS, False)
        b, b_weight = past_sum(past, W, BIAS_C, b_channel, None, conv_channel, conv_tap, BIAS, TAPS, False)
        c, c_weight = past_sum(past, W, BIAS_C, c_channel, None, conv_channel, conv_tap, BIAS, TAPS, False)
        if EARLY:
            begin(PDL)
        x = silu(x + tl.load(new + x_channel).to(tl.float32) * (x_scale * x_weight))
        b = silu(b + tl.load(new + b_channel).to(tl.float32) * (B_scale * b_weight))
        c = silu(c + tl.load(new + c_channel).to(tl.float32) * (C_scale * c_weight))
    dt = softplus(tl.load(new + C + h).to(tl.float32) * dt_scale + dt_bias)
    dt = tl.minimum(tl.maximum(dt, dt_low), dt_high)
    state = state * tl.exp(dt * A) + x[:, None] * (dt * b)[None, :]
    tl.store(place, state.to(SSM.dtype.element_ty), eviction_policy="evict_first")
    y = tl.sum(state * c[None, :], 1) + d * x
    if GATED:
        y = y * silu(tl.load(new - I + x_channel).to(tl.float32) * z_scale)
    tl.store(Y + row * I + x_channel, y)
