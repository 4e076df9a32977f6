"""Step sizes and log decays of the SSD scan, and the gradients of all that is one number a head and token.

In: dt as in_proj gives it (or as softplus has left it) and A; out: what scan kernels read, in chunks. The backward
takes the parts of the decay's gradient that those kernels leave, where mamba_ssm would run a dozen small operations.
Everything in float32; row offsets are 64-bit; sums are made in a fixed order.

Letters: B batch, T time, H heads, c chunks, Q tokens of a chunk, t tiles of a kernel's output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.softplus import softplus
from mambadsl.parts.triton.sums import column_sums

HEADS = 8  # of one program


class Steps(NamedTuple):
    """How dt and A are given. Raw (bias_H given): dt is softplus(dt + bias) within limit, A is -exp(A_H), and the
    tokens from lengths_B on (None: none) take no step. Otherwise dt and A are the step sizes and rates."""

    dt_BTH: Tensor
    A_H: Tensor
    bias_H: Tensor | None = None
    lengths_B: Tensor | None = None
    low: float = 0.0
    high: float | None = None

    def arguments(self) -> dict:
        return dict(
            dt_ptr=self.dt_BTH, A_ptr=self.A_H, bias_ptr=self.bias_H, lengths_ptr=self.lengths_B,
            T=self.dt_BTH.shape[1], H=self.dt_BTH.shape[2], dt_stride_b=self.dt_BTH.stride(0),
            dt_stride_t=self.dt_BTH.stride(1), dt_stride_h=self.dt_BTH.stride(2), low=self.low, high=self.high or 0.0,
            RAW=self.bias_H is not None, LENGTHS=self.lengths_B is not None, HIGH=self.high is not None,
        )


class DecayParts(NamedTuple):
    """What the scan's backward kernels leave. Each [t, B, c, H, Q] float32 where not said otherwise.

    step: of dt where it scales x. after: of the decay from a token to its chunk's end, one place late (place 0 is
    not set); before: of the decay from the chunk's start to a token; inside: of each token's decay, by pairs
    in the chunk (None: counted in `before`). across [B, c, H, t]: of the whole chunk's decay. D [t, B, c, H]: of D,
    None without it.
    """

    step: Tensor
    after: Tensor
    before: Tensor
    inside: Tensor | None
    across: Tensor
    D: Tensor | None


@triton.jit
def _step(raw, low, high, HIGH: tl.constexpr):
    """softplus(raw) within the limits, and its derivative."""
    step = softplus(raw)
    slope = tl.where(raw > 20.0, 1.0, tl.sigmoid(raw))
    slope = tl.where(step < low, 0.0, slope)
    step = tl.maximum(step, low)
    if HIGH:
        slope = tl.where(step > high, 0.0, slope)
        step = tl.minimum(step, high)
    return step, slope


@triton.jit
def _read(
    dt_ptr, A_ptr, bias_ptr, lengths_ptr, b, h, t, T, H, dt_stride_b, dt_stride_t, dt_stride_h, low, high,
    RAW: tl.constexpr, LENGTHS: tl.constexpr, HIGH: tl.constexpr,
):
    """Step sizes [h, t], 0 where there is no token; their derivative by dt; A; where dt is."""
    where = b.to(tl.int64) * dt_stride_b + t.to(tl.int64)[None, :] * dt_stride_t + h[:, None] * dt_stride_h
    token = (h < H)[:, None] & (t < T)[None, :]
    step = tl.load(dt_ptr + where, mask=token, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    slope = tl.full(step.shape, 1.0, tl.float32)
    real = token
    if RAW:
        A = -tl.exp(A)
        bias = tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        step, slope = _step(step + bias[:, None], low, high, HIGH)
        if LENGTHS:
            real = token & (t < tl.load(lengths_ptr + b))[None, :]
    return tl.where(real, step, 0.0), tl.where(real, slope, 0.0), A, where, token


@triton.jit
def _steps_forward(
    dt_ptr, A_ptr, bias_ptr, lengths_ptr, step_ptr, sum_ptr, T, H, dt_stride_b, dt_stride_t, dt_stride_h, low, high,
    RAW: tl.constexpr, LENGTHS: tl.constexpr, HIGH: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
):
    b, c = tl.program_id(0), tl.program_id(1)
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, Q)
    step, _, A, _, _ = _read(
        dt_ptr, A_ptr, bias_ptr, lengths_ptr, b, h, c * Q + q, T, H, dt_stride_b, dt_stride_t, dt_stride_h, low, high,
        RAW, LENGTHS, HIGH,
    )
    chunk = b.to(tl.int64) * tl.num_programs(1) + c
    to = (chunk * H + h)[:, None] * Q + q[None, :]
    mask = (h < H)[:, None] & (q < Q)[None, :]
    tl.store(step_ptr + to, step, mask=mask)
    tl.store(sum_ptr + to, tl.cumsum(step * A[:, None], axis=1), mask=mask)


@triton.jit
def _tiles(ptr, at, mask, tiles, tile_stride):
    total = tl.load(ptr + at, mask=mask, other=0.0)
    for tile in range(1, tiles):
        total += tl.load(ptr + tl.cast(tile, tl.int64) * tile_stride + at, mask=mask, other=0.0)
    return total


@triton.jit
def _steps_backward(
    dt_ptr, A_ptr, bias_ptr, lengths_ptr,
    step_ptr, after_ptr, before_ptr, inside_ptr, across_ptr, D_ptr, ddt_ptr, sums_ptr,
    T, H, dt_stride_b, dt_stride_t, dt_stride_h, low, high,
    ddt_stride_b, ddt_stride_t, ddt_stride_h, step_tiles, after_tiles, before_tiles, inside_tiles,
    across_tiles, across_stride, D_tiles, D_stride,
    RAW: tl.constexpr, LENGTHS: tl.constexpr, HIGH: tl.constexpr, HAS_D: tl.constexpr, HAS_INSIDE: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr,
):
    b, c = tl.program_id(0), tl.program_id(1)
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, Q)
    t = c * Q + q
    step, slope, A, _, token = _read(
        dt_ptr, A_ptr, bias_ptr, lengths_ptr, b, h, t, T, H, dt_stride_b, dt_stride_t, dt_stride_h, low, high,
        RAW, LENGTHS, HIGH,
    )
    heads = h < H
    mask = heads[:, None] & (q < Q)[None, :]
    chunk = b.to(tl.int64) * tl.num_programs(1) + c
    chunks = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    head = chunk * H + h
    at = head[:, None] * Q + q[None, :]
    tile_stride = chunks * H * Q

    d_step = _tiles(step_ptr, at, mask, step_tiles, tile_stride)
    after = _tiles(after_ptr, at, mask & (q > 0)[None, :], after_tiles, tile_stride)
    before = _tiles(before_ptr, at, mask, before_tiles, tile_stride)
    d_decay = tl.cumsum(after, axis=1) + tl.cumsum(before, axis=1, reverse=True)
    if HAS_INSIDE:
        d_decay += _tiles(inside_ptr, at, mask, inside_tiles, tile_stride)
    across = tl.zeros([HEADS], tl.float32)
    for tile in range(0, across_tiles):
        across += tl.load(across_ptr + head * across_stride + tile, mask=heads, other=0.0)
    d_decay += across[:, None]

    d_raw = (d_step + d_decay * A[:, None]) * slope
    to = b.to(tl.int64) * ddt_stride_b + t.to(tl.int64)[None, :] * ddt_stride_t + h[:, None] * ddt_stride_h
    tl.store(ddt_ptr + to, d_raw.to(ddt_ptr.dtype.element_ty), mask=token)
    dA = tl.sum(d_decay * step, axis=1)
    if RAW:
        dA = dA * A
    sums = sums_ptr + chunk * 3 * H + h
    tl.store(sums, dA, mask=heads)
    tl.store(sums + H, tl.sum(tl.where(token, d_raw, 0.0), axis=1), mask=heads)
    dD = tl.zeros([HEADS], tl.float32)
    if HAS_D:
        for tile in range(0, D_tiles):
            dD += tl.load(D_ptr + tl.cast(tile, tl.int64) * D_stride + head, mask=heads, other=0.0)
    tl.store(sums + 2 * H, dD, mask=heads)


def forward(steps: Steps, *, chunk: int) -> tuple[Tensor, Tensor]:
    """Step sizes, and log decays summed from the start of each chunk: [B, c, H, Q] float32."""
    B, T, H = steps.dt_BTH.shape
    c = triton.cdiv(T, chunk)
    step_BcHQ, sum_BcHQ = (steps.dt_BTH.new_empty(B, c, H, chunk, dtype=torch.float32) for _ in range(2))
    _steps_forward[B, c, triton.cdiv(H, HEADS)](
        step_ptr=step_BcHQ, sum_ptr=sum_BcHQ, Q=chunk, HEADS=HEADS, **steps.arguments()
    )
    return step_BcHQ, sum_BcHQ


def backward(steps: Steps, parts: DecayParts, *, ddt: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Writes dt's gradient to `ddt` [B, T, H]; returns those of A, the bias and D, [3, H] in `dtype`: of A_log where
    the steps are raw."""
    B, T, H = steps.dt_BTH.shape
    c, chunk = parts.step.shape[2], parts.step.shape[-1]
    sums_c3H = steps.dt_BTH.new_empty(B * c, 3, H, dtype=torch.float32)
    _steps_backward[B, c, triton.cdiv(H, HEADS)](
        step_ptr=parts.step, after_ptr=parts.after, before_ptr=parts.before, inside_ptr=parts.inside,
        across_ptr=parts.across, D_ptr=parts.D, ddt_ptr=ddt, sums_ptr=sums_c3H,
        ddt_stride_b=ddt.stride(0), ddt_stride_t=ddt.stride(1), ddt_stride_h=ddt.stride(2),
        step_tiles=parts.step.shape[0], after_tiles=parts.after.shape[0], before_tiles=parts.before.shape[0],
        inside_tiles=0 if parts.inside is None else parts.inside.shape[0],
        across_tiles=parts.across.shape[3], across_stride=parts.across.stride(2),
        D_tiles=0 if parts.D is None else parts.D.shape[0], D_stride=0 if parts.D is None else parts.D.stride(0),
        HAS_D=parts.D is not None, HAS_INSIDE=parts.inside is not None, Q=chunk, HEADS=HEADS,
        **steps.arguments(),
    )
    return column_sums(sums_c3H, dtype)
