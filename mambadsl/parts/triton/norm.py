"""RMS norm over the last axis, forward and backward, in Triton: for GPUs without torch.compile, whose own fusion of
residual, norm and casts is as good.

In: x and the weight of the slot `model.norm`, on a GPU; out: its result, in the dtype of x or the one asked for. What
is computed is written in `kinds/norm.py`; float32 inside. Refuses (ValueError) more than WIDEST_NORM channels.

Letters: R rows, D channels, P programs of the backward kernel.
"""

from collections.abc import Callable
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.kinds.norm import rms_norm as definition
from mambadsl.parts.triton.launch import Launch, dense_rows, launch_of, persistent
from mambadsl.parts.triton.limits import WIDEST_NORM
from mambadsl.parts.triton.sums import column_sums

#: Block of channels -> launch, as in `gate_norm`.
FORWARD = {
    512: Launch(4, 4), 1024: Launch(2, 4), 2048: Launch(1, 4), 4096: Launch(1, 8), 8192: Launch(1, 16),
    16384: Launch(1, 16),
}
BACKWARD = {
    512: Launch(2, 4, 3, 6, 80), 1024: Launch(1, 4, 3, 6, 80), 2048: Launch(1, 4, 3, 5, 96),
    4096: Launch(1, 8, 3, 2, 96), 8192: Launch(1, 16, 3, 1, 96), 16384: Launch(1, 32, 2, 1, 64),
}


@triton.jit
def _rms_norm_forward(
    x_ptr, weight_ptr, out_ptr, rstd_ptr, R, x_stride, eps,
    D: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    mask = (row < R)[:, None] & (channel < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < R)
    x = x * rstd[:, None]
    if weight_ptr is not None:
        x = x * (tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32) + OFFSET)[None, :]
    tl.store(out_ptr + row[:, None] * D + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward(
    dout_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, R, dout_stride, x_stride,
    D: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    if weight_ptr is not None:
        dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < R)[:, None] & (channel < D)[None, :]
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < R, other=0.0)[:, None]
        unit = x * rstd
        if weight_ptr is not None:
            dweight += dout * unit
            dout = dout * (tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32) + OFFSET)[None, :]
        dx = (dout - unit * (tl.sum(dout * unit, 1) / D)[:, None]) * rstd
        tl.store(dx_ptr + row[:, None] * D + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(0) * D + channel, tl.sum(dweight, 0), mask=channel < D)


def rms_norm_forward(
    x_RD: Tensor, weight_D: Tensor | None, *, eps: float, zero_centered: bool = False,
    dtype: torch.dtype | None = None, launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [R, D] in `dtype` or the dtype of x, rstd [R] float32). Rows of x may be of a wider buffer."""
    R, D = x_RD.shape
    block = _block(D)
    launch = launch or launch_of(FORWARD, block)
    out_RD = torch.empty((R, D), dtype=dtype or x_RD.dtype, device=x_RD.device)
    rstd_R = torch.empty(R, dtype=torch.float32, device=x_RD.device)
    if R:
        with torch.cuda.device_of(x_RD):
            _rms_norm_forward[triton.cdiv(R, launch.rows),](
                x_RD, weight_D, out_RD, rstd_R, R, x_RD.stride(0), eps,
                D=D, OFFSET=float(zero_centered), ROWS=launch.rows, BLOCK=block, num_warps=launch.warps,
            )
    return out_RD, rstd_R


def rms_norm_backward(
    dout_RD: Tensor, x_RD: Tensor, weight_D: Tensor | None, rstd_R: Tensor, *, zero_centered: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight_D in the weight's dtype; None without a weight). Equal inputs give equal bits."""
    R, D = x_RD.shape
    block = _block(D)
    read = (dout_RD, x_RD) if weight_D is None else (dout_RD, x_RD, weight_D)
    launch, P = persistent(launch or launch_of(BACKWARD, block), block, rows=R, pieces=1, read=read)
    dx_RD = torch.empty((R, D), dtype=x_RD.dtype, device=x_RD.device)
    dweight_PD = None if weight_D is None else torch.empty((P, D), dtype=torch.float32, device=x_RD.device)
    if R:
        with torch.cuda.device_of(x_RD):
            _rms_norm_backward[P,](
                dout_RD, x_RD, weight_D, rstd_R, dx_RD, dweight_PD, R, dout_RD.stride(0), x_RD.stride(0),
                D=D, OFFSET=float(zero_centered), ROWS=launch.rows, BLOCK=block, STAGES=launch.stages,
                num_warps=launch.warps, maxnreg=launch.registers,
            )
    return dx_RD, None if dweight_PD is None else column_sums(dweight_PD, weight_D.dtype)


def _block(channels: int) -> int:
    if channels > WIDEST_NORM:
        raise ValueError(f"the RMS norm takes at most {WIDEST_NORM} channels, not {channels}")
    return triton.next_power_of_2(channels)


@torch.library.custom_op("mambadsl::rms_norm", mutates_args=())
def _op(
    x_RD: Tensor, weight_D: Optional[Tensor], eps: float, zero_centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return rms_norm_forward(x_RD, weight_D, eps=eps, zero_centered=zero_centered, dtype=dtype)


@_op.register_fake
def _(x_RD, weight_D, eps, zero_centered, dtype):
    return x_RD.new_empty(x_RD.shape, dtype=dtype), x_RD.new_empty(x_RD.shape[0], dtype=torch.float32)


@torch.library.custom_op("mambadsl::rms_norm_backward", mutates_args=())
def _backward_op(
    dout_RD: Tensor, x_RD: Tensor, weight_D: Optional[Tensor], rstd_R: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    dx_RD, dweight_D = rms_norm_backward(dout_RD, x_RD, weight_D, rstd_R, zero_centered=zero_centered)
    return dx_RD, x_RD.new_empty(0) if weight_D is None else dweight_D


@_backward_op.register_fake
def _(dout_RD, x_RD, weight_D, rstd_R, zero_centered):
    return x_RD.new_empty(x_RD.shape), (x_RD.new_empty(0) if weight_D is None else weight_D.new_empty(weight_D.shape))


def _save(ctx, inputs, output):
    x_RD, weight_D, _, ctx.zero_centered, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_RD, weight_D, output[1])


def _backward(ctx, dout_RD, _):
    x_RD, weight_D, rstd_R = ctx.saved_tensors
    dx_RD, dweight_D = _backward_op(dense_rows(dout_RD), x_RD, weight_D, rstd_R, ctx.zero_centered)
    return dx_RD, None if weight_D is None else dweight_D, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def make_rms_norm() -> Callable[..., Tensor]:
    """The function of the slot `model.norm`: rms_norm(x, weight_D, *, eps, zero_centered, dtype) as `kinds/norm.py`.

    While torch.compile traces, that definition itself: the compiler joins it to the sum before and the cast after.
    """

    def rms_norm(
        x: Tensor, weight_D: Tensor | None, *, eps: float, zero_centered: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return definition(x, weight_D, eps=eps, zero_centered=zero_centered, dtype=dtype)
        out_RD, _ = _op(dense_rows(x), weight_D, eps, zero_centered, dtype or x.dtype)
        return out_RD.view(x.shape)

    return rms_norm
