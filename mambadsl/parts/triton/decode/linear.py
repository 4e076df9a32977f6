"""Projections of one token a row: norm and scale before, bias, activation and residual sum after, in one kernel.

In: x_BK (float32 or the weights' dtype), weight_NK, the norm of x if it has one. Out: y_BN, or the residual stream
with the projection added to it in place. The ways, by batch (`configs.PATHS`): `matvec` streams the weights past
rows held in registers, and computes the norm's statistics on the way; `skinny` feeds tensor cores, from rows that a
kernel has normed; `cublas` is the library's product, which adds into a float32 stream directly, `cublas_rounded` by a
kernel of its own.

Letters: B batch, K inputs, N outputs, G norm groups; F hidden width of a gated layer (weights [gate | up], N = 2F).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.decode.configs import MATVEC, SKINNY, Block, Tile, for_batch, paths_for
from mambadsl.parts.triton.decode.conv import NO_SHIFT, Shift, shift_conv
from mambadsl.parts.triton.decode.device import activation, begin, launch_options, norm_scale, prefetch, silu
from mambadsl.parts.triton.decode.norm import RowNorm, activate, norm_rows


@dataclass(frozen=True)
class After:
    """What happens to W x * in_scale + bias. gated: act(gate * gate_multiplier) * up. out_scale: the last."""

    act: str = "none"
    gated: bool = False
    gate_multiplier: float = 1.0
    in_scale: float = 1.0
    out_scale: float = 1.0


PLAIN = After()


def norm_linear(
    x_BK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, norm: RowNorm | None = None, after: After = PLAIN,
    dtype: torch.dtype | None = None, path: str | None = None, tile: Block | Tile | None = None,
) -> Tensor:
    """[B, N], or [B, F] where gated, in `dtype` (the weights' unless given). path, tile: by batch unless given."""
    B, N = x_BK.shape[0], weight_NK.shape[0] // (2 if after.gated else 1)
    path, dtype = path or paths_for(B)[0], dtype or weight_NK.dtype
    if path == "matvec":
        y_BN = x_BK.new_empty((B, N), dtype=dtype)
        _matvec(x_BK, weight_NK, bias_N, y_BN, norm=norm, after=after, tile=tile)
        return y_BN
    if norm is not None or x_BK.dtype != weight_NK.dtype:
        x_BK = norm_rows(x_BK, norm, dtype=weight_NK.dtype, scale=after.in_scale)
    elif after.in_scale != 1:
        x_BK = x_BK * after.in_scale
    if path == "skinny":
        y_BN = x_BK.new_empty((B, N), dtype=dtype)
        _skinny(x_BK, weight_NK, bias_N, y_BN, after=after, tile=tile)
        return y_BN
    y_BN = F.linear(x_BK, weight_NK, bias_N)
    if after.act != "none" or after.gated:
        y_BN = activate(y_BN, act=after.act, gated=after.gated, gate_multiplier=after.gate_multiplier)
    if after.out_scale != 1:
        y_BN = y_BN * after.out_scale
    return y_BN if y_BN.dtype == dtype else y_BN.to(dtype)


def linear_add(
    y_BK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x_BN: Tensor, *, norm: RowNorm | None = None,
    out_scale: float = 1.0, shift: Shift = NO_SHIFT, path: str | None = None, tile: Block | Tile | None = None,
) -> Tensor:
    """x_BN += out_scale * (W norm(y) + bias), in place; returns it. shift: a convolution's state to move on."""
    path = path or path_of(y_BK.shape[0], norm=norm, K=y_BK.shape[1])
    after = After(out_scale=out_scale)
    if path == "matvec":
        _matvec(y_BK, weight_NK, bias_N, x_BN, norm=norm, after=after, shift=shift, add=True, tile=tile)
        return x_BN
    if norm is not None or shift.conv_BCJ is not None or y_BK.dtype != weight_NK.dtype:
        y_BK = norm_rows(y_BK, norm, dtype=weight_NK.dtype, shift=shift)
    if path == "skinny":
        _skinny(y_BK, weight_NK, bias_N, x_BN, after=after, add=True, tile=tile)
        return x_BN
    if path == "cublas_rounded":
        return x_BN.add_(F.linear(y_BK, weight_NK, bias_N), alpha=out_scale)
    if bias_N is not None:
        x_BN.add_(bias_N, alpha=out_scale)
    if x_BN.dtype == weight_NK.dtype:
        return torch.addmm(x_BN, y_BK, weight_NK.t(), alpha=out_scale, out=x_BN)
    if x_BN.dtype == torch.float32 and y_BK.is_cuda:
        if _sums_in_float32(x_BN.device):
            return torch.ops.aten.addmm.dtype_out(x_BN, y_BK, weight_NK.t(), torch.float32, alpha=out_scale, out=x_BN)
        return x_BN.add_(torch.mm(y_BK, weight_NK.t(), out_dtype=torch.float32), alpha=out_scale)
    raise ValueError(f"a residual stream of {x_BN.dtype} and weights of {weight_NK.dtype}: float32 or the same")


@cache
def _sums_in_float32(device: torch.device) -> bool:
    """Whether this torch adds a product of bfloat16 to a float32 matrix (older ones want that in bfloat16, too)."""
    x, y = torch.zeros(8, 8, device=device), torch.zeros(8, 8, device=device, dtype=torch.bfloat16)
    try:
        torch.ops.aten.addmm.dtype_out(x, y, y, torch.float32, out=x)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        return False
    return True


def path_of(batch: int, *, norm: RowNorm | None, K: int) -> str:
    """The way for a batch; of norm groups, `matvec` computes those that are powers of two wide."""
    path = paths_for(batch)[1]
    odd = norm is not None and norm.groups > 1 and (K // norm.groups) & (K // norm.groups - 1)
    return "skinny" if path == "matvec" and odd else path


def _matvec(x_BK, weight, bias, out, *, norm, after, shift=NO_SHIFT, add=False, tile=None):
    B, K = x_BK.shape
    N = out.shape[1]
    tile = tile or for_batch(MATVEC, B)
    groups = 1 if norm is None else norm.groups
    columns = min(tile.columns, triton.next_power_of_2(K))
    if groups > 1:
        group = K // groups
        if group & (group - 1):
            raise ValueError(f"norm groups of {group} channels: a power of two is needed for a batch of {B}")
        columns = max(columns, group)
    elements = tile.elements * 2 // max(2, weight.element_size())
    rows = max(1, min(elements // columns, triton.next_power_of_2(N)))
    programs = triton.cdiv(N, rows)
    tensors, sizes = shift.arguments(x_BK)
    z = None if norm is None else norm.z_BE
    options = launch_options(x_BK)
    _matvec_kernel[(programs,)](
        x_BK, weight, None if norm is None else norm.weight, z, bias, out, *tensors,
        K, N, x_BK.stride(0), 0 if z is None else z.stride(0), out.stride(0), *sizes, programs,
        1.0 if norm is None else norm.eps, 1.0 if norm is None else norm.z_scale,
        after.in_scale, after.gate_multiplier, after.out_scale,
        B=B, BB=triton.next_power_of_2(B), NORM=norm is not None,
        HAS_WEIGHT=norm is not None and norm.weight is not None, CENTERED=norm is not None and norm.zero_centered,
        GROUP=K // groups if groups > 1 else 0, GATE=z is not None,
        ACT=after.act, GATED=after.gated, BIAS=bias is not None, ADD=add, TAPS=shift.taps, EVEN=K % columns == 0,
        ROWS=rows, COLUMNS=columns, STAGES=tile.stages, MORE=K if K > columns else 0,
        num_warps=tile.warps, **options,
    )


def _skinny(x_BK, weight, bias, out, *, after, add=False, tile=None):
    B, K = x_BK.shape
    N = out.shape[1]
    tile = tile or for_batch(SKINNY, B)
    # 16: the least that tensor cores multiply.
    split = max(1, min(tile.split, triton.next_power_of_2(K) // 16))
    columns = min(tile.columns, max(16 * split, triton.next_power_of_2(K)))
    _skinny_kernel[(triton.cdiv(N, tile.rows),)](
        x_BK, weight, bias, out, K, N, B, x_BK.stride(0), out.stride(0), after.gate_multiplier, after.out_scale,
        BB=max(8, triton.next_power_of_2(B)), ACT=after.act, GATED=after.gated, BIAS=bias is not None, ADD=add,
        EVEN=K % columns == 0, ROWS=tile.rows, COLUMNS=columns, SPLIT=split, WIDTH=max(64, triton.next_power_of_2(K)),
        num_warps=tile.warps, num_stages=tile.stages if weight.element_size() == 2 else 2, **launch_options(x_BK),
    )


@triton.jit
def _finish(
    acc, up, BIAS_N, OUT, n, b, N, B, out_stride, gate_multiplier, out_scale,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):
    """acc, up: [ROWS, BB] products -> OUT[b, n]."""
    in_N = n < N
    if BIAS:
        acc += tl.load(BIAS_N + n, mask=in_N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if BIAS:
            up += tl.load(BIAS_N + N + n, mask=in_N, other=0.0).to(tl.float32)[:, None]
        acc = activation(acc * gate_multiplier, ACT) * up
    else:
        acc = activation(acc, ACT)
    acc = acc * out_scale
    place = OUT + b.to(tl.int64)[None, :] * out_stride + n[:, None]
    mask = in_N[:, None] & (b < B)[None, :]
    if ADD:
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _x_block(
    X, Z, b, k, K, x_stride, z_stride, eps, z_scale, norm_w, GROUP: tl.constexpr, GATE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of row b: with the norm's scale norm_w, its gate and, where groups fit the block, the norm itself; and
    the squares that the norm of the whole row is made of."""
    mask = k < K
    x = tl.load(X + b * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    squares = x * x
    if GROUP > 0:
        by_group = tl.reshape(squares, (COLUMNS // GROUP, GROUP))
        root = tl.sqrt(tl.sum(by_group, 1) / GROUP + eps)
        x = tl.reshape(tl.reshape(x, (COLUMNS // GROUP, GROUP)) / root[:, None], (COLUMNS,))
    x = x * norm_w
    if GATE:
        x = x * silu(tl.load(Z + b * z_stride + k, mask=mask, other=0.0).to(tl.float32) * z_scale)
    return x, squares


@triton.jit
def _w_block(W, n, k, N, K, EVEN: tl.constexpr):
    place = W + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN:
        return tl.load(place, mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
    return tl.load(place, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _matvec_kernel(
    X, W, NORM_W, Z, BIAS_N, OUT, ZX, CONV, K, N, x_stride, z_stride, out_stride, I, S, C, zx_stride,
    conv_row, conv_channel, conv_tap, x_scale, B_scale, C_scale, programs, eps, z_scale, in_scale, gate_multiplier,
    out_scale,
    B: tl.constexpr, BB: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, CENTERED: tl.constexpr,
    GROUP: tl.constexpr, GATE: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, TAPS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, MORE: tl.constexpr, PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    n = pid * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    b = tl.arange(0, BB)
    last = 2 * N if GATED else N
    # The first block of weights is on its way while the kernel before this one ends; the norm's, too.
    norm_w = norm_scale(NORM_W, k, k < K, HAS_WEIGHT, CENTERED)
    w = _w_block(W, n, k, N, K, EVEN)
    if GATED:
        u = _w_block(W, n + N, k, last, K, EVEN)
    begin(PDL)
    acc = tl.zeros((ROWS, BB), tl.float32)
    up = tl.zeros((ROWS, BB), tl.float32)
    squares = tl.zeros((BB,), tl.float32)
    for i in tl.static_range(B):
        x, xx = _x_block(X, Z, i, k, K, x_stride, z_stride, eps, z_scale, norm_w, GROUP, GATE, COLUMNS)
        row = b == i
        acc += tl.where(row[None, :], tl.sum(w.to(tl.float32) * x[None, :], 1)[:, None], 0.0)
        if GATED:
            up += tl.where(row[None, :], tl.sum(u.to(tl.float32) * x[None, :], 1)[:, None], 0.0)
        if NORM and GROUP == 0:
            squares += tl.where(row, tl.sum(xx, 0), 0.0)
    # K where it is longer than the first block: else there is no loop, and no memory kept for its loads.
    for start in tl.range(COLUMNS, MORE, COLUMNS, num_stages=STAGES):
        w = _w_block(W, n, start + k, N, K, EVEN)
        if GATED:
            u = _w_block(W, n + N, start + k, last, K, EVEN)
        norm_w = norm_scale(NORM_W, start + k, start + k < K, HAS_WEIGHT, CENTERED)
        for i in tl.static_range(B):
            x, xx = _x_block(X, Z, i, start + k, K, x_stride, z_stride, eps, z_scale, norm_w, GROUP, GATE, COLUMNS)
            row = b == i
            acc += tl.where(row[None, :], tl.sum(w.to(tl.float32) * x[None, :], 1)[:, None], 0.0)
            if GATED:
                up += tl.where(row[None, :], tl.sum(u.to(tl.float32) * x[None, :], 1)[:, None], 0.0)
            if NORM and GROUP == 0:
                squares += tl.where(row, tl.sum(xx, 0), 0.0)
    scale = tl.full((BB,), 1.0, tl.float32) * in_scale
    if NORM and GROUP == 0:
        scale = scale / tl.sqrt(squares / K + eps)
    _finish(
        acc * scale[None, :], up * scale[None, :], BIAS_N, OUT, n, b, N, B, out_stride, gate_multiplier, out_scale,
        ACT, GATED, BIAS, ADD,
    )
    if TAPS > 1:
        for task in range(pid, tl.cdiv(C, 256) * B, programs):
            channels = (task // B) * 256 + tl.arange(0, 256)
            shift_conv(
                ZX, CONV, task % B, channels, channels < C, I, S, zx_stride, conv_row, conv_channel,
                conv_tap, x_scale, B_scale, C_scale, TAPS,
            )


@triton.jit
def _skinny_kernel(
    X, W, BIAS_N, OUT, K, N, B, x_stride, out_stride, gate_multiplier, out_scale,
    BB: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BB)
    last = 2 * N if GATED else N
    if PDL:
        # All of this program's weights are asked for while the kernel before this one ends, so that the loop finds
        # them in the L2 cache.
        line: tl.constexpr = 1024 // W.dtype.element_ty.primitive_bitwidth
        lines = tl.minimum(tl.arange(0, WIDTH // line) * line, K - 1)[None, :]
        prefetch(W + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + lines)
        if GATED:
            prefetch(W + tl.minimum(n + N, last - 1).to(tl.int64)[:, None] * K + lines)
    begin(PDL)
    # Blocks are [part, row, column of the part] and [part, column, b]: each warp has its own part of the columns.
    PART: tl.constexpr = COLUMNS // SPLIT
    part = tl.arange(0, SPLIT) * PART
    k = tl.arange(0, PART)
    w_k = part[:, None, None] + k[None, None, :]
    x_k = part[:, None, None] + k[None, :, None]
    w_place = W + n.to(tl.int64)[None, :, None] * K + w_k
    x_place = X + b[None, None, :] * x_stride + x_k
    in_N = (n < N)[None, :, None]
    in_B = (b < B)[None, None, :]
    acc = tl.zeros((SPLIT, ROWS, BB), tl.float32)
    up = tl.zeros((SPLIT, ROWS, BB), tl.float32)
    for start in range(0, K, COLUMNS):
        w_mask, x_mask = in_N, in_B
        if not EVEN:
            w_mask = w_mask & (start + w_k < K)
            x_mask = x_mask & (start + x_k < K)
        x = tl.load(x_place + start, mask=x_mask, other=0.0)
        w = tl.load(w_place + start, mask=w_mask, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            u_place = w_place + start + tl.cast(N, tl.int64) * K
            u = tl.load(u_place, mask=w_mask, other=0.0, eviction_policy="evict_first")
            up = tl.dot(u, x, up, input_precision="ieee")
    _finish(
        tl.sum(acc, 0), tl.sum(up, 0), BIAS_N, OUT, n, b, N, B, out_stride, gate_multiplier, out_scale,
        ACT, GATED, BIAS, ADD,
    )
