"""RMS norm of one token a row, plain or with the gate of Mamba-2, and activations: the passes between products.

In: rows of the residual stream or of a mixer's output, any dtype. Out: rows in the dtype that the next product
reads. Float32 inside. Definitions: `rms_norm` in `kinds/norm.py`, `gate_norm` in `kinds/mamba2/module.py`.

Letters: B batch, K channels, G norm groups, E in_proj channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.decode.conv import NO_SHIFT, Shift, shift_conv
from mambadsl.parts.triton.decode.device import activation, begin, launch_options, norm_scale, silu


@dataclass(frozen=True)
class RowNorm:
    """norm(x) * weight over each of `groups` groups; with z_BE, times silu(z * z_scale), z its first channels."""

    weight: Tensor | None
    eps: float
    zero_centered: bool = False
    groups: int = 1
    z_BE: Tensor | None = None
    z_scale: float = 1.0


def norm_rows(
    x_BK: Tensor, norm: RowNorm | None, *, dtype: torch.dtype, scale: float = 1.0, shift: Shift = NO_SHIFT,
    warps: int | None = None,
) -> Tensor:
    """norm(x) * scale in `dtype`; only the scale and the dtype where there is no norm."""
    B, K = x_BK.shape
    out_BK = x_BK.new_empty((B, K), dtype=dtype)
    groups = 1 if norm is None else norm.groups
    block = triton.next_power_of_2(K // groups)
    z = None if norm is None else norm.z_BE
    tensors, sizes = shift.arguments(x_BK)
    _norm_kernel[(B, groups)](
        x_BK, None if norm is None else norm.weight, z, out_BK, *tensors,
        K // groups, x_BK.stride(0), 0 if z is None else z.stride(0), K, groups, *sizes,
        1.0 if norm is None else norm.eps, 1.0 if norm is None else norm.z_scale, scale,
        NORM=norm is not None, HAS_WEIGHT=norm is not None and norm.weight is not None,
        CENTERED=norm is not None and norm.zero_centered, GATE=z is not None, TAPS=shift.taps, BLOCK=block,
        num_warps=warps or max(1, min(8, block // 256)), **launch_options(x_BK),
    )
    return out_BK


@triton.jit
def _norm_kernel(
    X, NORM_W, Z, OUT, ZX, CONV, width, x_stride, z_stride, out_stride, groups, I, S, C, zx_stride,
    conv_row, conv_channel, conv_tap, x_scale, B_scale, C_scale, eps, z_scale, scale,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, CENTERED: tl.constexpr, GATE: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    inside = tl.arange(0, BLOCK)
    mask = inside < width
    k = group * width + inside
    norm_w = norm_scale(NORM_W, k, mask, HAS_WEIGHT, CENTERED)
    begin(PDL)
    x = tl.load(X + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        x = x / tl.sqrt(tl.sum(x * x, 0) / width + eps) * norm_w
    if GATE:
        x = x * silu(tl.load(Z + row * z_stride + k, mask=mask, other=0.0).to(tl.float32) * z_scale)
    tl.store(OUT + row * out_stride + k, (x * scale).to(OUT.dtype.element_ty), mask=mask)
    if TAPS > 1:
        for start in range(group * 1024, C, groups * 1024):
            channels = start + tl.arange(0, 1024)
            shift_conv(
                ZX, CONV, row, channels, channels < C, I, S, zx_stride, conv_row, conv_channel, conv_tap, x_scale,
                B_scale, C_scale, TAPS,
            )


def activate(h_BN: Tensor, *, act: str, gated: bool, gate_multiplier: float = 1.0) -> Tensor:
    """act(h), or act(gate * gate_multiplier) * up of h = [gate | up]; same dtype."""
    B, N = h_BN.shape
    width = N // 2 if gated else N
    out = h_BN.new_empty((B, width))
    block = min(1024, triton.next_power_of_2(width))
    _act_kernel[(triton.cdiv(width, block), B)](
        h_BN, out, width, h_BN.stride(0), gate_multiplier, ACT=act, GATED=gated, BLOCK=block, num_warps=4,
        **launch_options(h_BN),
    )
    return out


@triton.jit
def _act_kernel(
    H, OUT, width, stride, gate_multiplier, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < width
    begin(PDL)
    h = tl.load(H + row * stride + k, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        h = activation(h * gate_multiplier, ACT) * tl.load(H + row * stride + width + k, mask=mask, other=0.0).to(
            tl.float32
        )
    else:
        h = activation(h, ACT)
    tl.store(OUT + row * width + k, h.to(OUT.dtype.element_ty), mask=mask)
