"""The kernels of `gate_norm.py`, and of `cut_norm.py`, on rows: the gate and the grouped RMS norm in one pass, forward
and backward.

What is computed is written in `kinds/gate_norm.py`; float32 inside, whatever the dtypes. Refuses (ValueError) groups
wider than WIDEST_NORM channels.

Letters: R rows (B * T), I channels, G groups, P programs of the backward kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.launch import Launch, launch_of, persistent
from mambadsl.parts.triton.limits import WIDEST_NORM
from mambadsl.parts.triton.sums import column_sums

#: Without a norm nothing ties the channels together, and they are cut as suits the GPU.
PIECE = 2048
#: Block of channels (a power of two) -> launch; narrower blocks hold as many channels as the first, in more rows.
FORWARD = {
    512: Launch(4, 4), 1024: Launch(2, 4), 2048: Launch(1, 4), 4096: Launch(1, 8), 8192: Launch(1, 16),
    16384: Launch(1, 16),
}
BACKWARD = {
    512: Launch(2, 4, 3, 5, 96), 1024: Launch(1, 4, 3, 5, 96), 2048: Launch(1, 4, 3, 4, 128),
    4096: Launch(1, 8, 3, 2, 128), 8192: Launch(1, 16, 3, 1, 128), 16384: Launch(1, 32, 2, 1, 64),
}


@triton.jit
def _gate_norm_forward(
    y_ptr, z_ptr, weight_ptr, out_ptr, rstd_ptr, R, y_stride, z_stride, out_stride, eps,
    ORDER: tl.constexpr, GATE: tl.constexpr, I: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    channel = group * WIDTH + column
    inside = (column < WIDTH) & (channel < I)
    mask = (row < R)[:, None] & inside[None, :]
    y = tl.load(y_ptr + row[:, None] * y_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row[:, None] * z_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(z)
    if GATE == "silu":
        gate = z * gate
    if ORDER != "before_gate":
        y = y * gate
    rstds = rstd_ptr + row * tl.num_programs(1) + group
    if PART == "means":
        tl.store(rstds, tl.sum(y * y, 1) / WIDTH, mask=row < R)
    else:
        if ORDER != "none":
            weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
            if PART == "rest":
                rstd = tl.load(rstds, mask=row < R, other=0.0)
            else:
                rstd = 1.0 / tl.sqrt(tl.sum(y * y, 1) / WIDTH + eps)
                tl.store(rstds, rstd, mask=row < R)
            y = y * rstd[:, None] * weight[None, :]
        if ORDER == "before_gate":
            y = y * gate
        tl.store(out_ptr + row[:, None] * out_stride + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_norm_backward(
    dout_ptr, y_ptr, z_ptr, weight_ptr, rstd_ptr, mean_ptr, dy_ptr, dz_ptr, dweight_ptr, R,
    dout_stride, y_stride, z_stride, dy_stride, dz_stride,
    ORDER: tl.constexpr, GATE: tl.constexpr, I: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr,
):
    group = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    channel = group * WIDTH + column
    inside = (column < WIDTH) & (channel < I)
    if ORDER != "none" and PART != "means":
        dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < R)[:, None] & inside[None, :]
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row[:, None] * y_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row[:, None] * z_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        dgate = gate * (1.0 - gate)
        if GATE == "silu":
            dgate = gate + z * dgate
            gate = z * gate
        if ORDER == "none":
            dy = dout * gate
            dz = dout * y * dgate
        else:
            rstd = tl.load(rstd_ptr + row * tl.num_programs(1) + group, mask=row < R, other=0.0)[:, None]
            # Read again for every row: held in registers, it would halve how many programs fit.
            weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            if ORDER == "after_gate":
                unit = y * gate * rstd
                share = dout * unit
                dunit = dout * weight
            else:
                unit = y * rstd
                share = dout * gate * unit
                dunit = dout * weight * gate
            place = row * tl.num_programs(1) + group
            if PART == "means":
                tl.store(mean_ptr + place, tl.sum(dunit * unit, 1) / WIDTH, mask=row < R)
            else:
                dweight += share
                if PART == "rest":
                    mean = tl.load(mean_ptr + place, mask=row < R, other=0.0)
                else:
                    mean = tl.sum(dunit * unit, 1) / WIDTH
                dnormed = (dunit - unit * mean[:, None]) * rstd
                if ORDER == "after_gate":
                    dy = dnormed * gate
                    dz = dnormed * y * dgate
                else:
                    dy = dnormed
                    dz = dout * weight * unit * dgate
        if PART != "means":
            tl.store(dy_ptr + row[:, None] * dy_stride + channel[None, :], dy.to(dy_ptr.dtype.element_ty), mask=mask)
            tl.store(dz_ptr + row[:, None] * dz_stride + channel[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if ORDER != "none" and PART != "means":
        tl.store(dweight_ptr + tl.program_id(0) * I + channel, tl.sum(dweight, 0), mask=inside)


def gate_norm_forward(
    y_RI: Tensor, z_RI: Tensor, weight_I: Tensor | None, *, order: str, groups: int, eps: float,
    gate: str = "silu", out: Tensor | None = None, launch: Launch | None = None, part: str = "whole",
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [R, I] in the dtype of y, rstd [R, G] float32; [R, 0] for order none).

    y, z and `out` may be rows of wider buffers: the last stride is 1. launch: other than the table's. part, where the
    rows are pieces of what is normed: "means" gives the means of squares for rstd, and no out; "rest" takes `rstd`.
    """
    (R, I), (width, pieces) = y_RI.shape, _pieces(y_RI.shape[1], groups, order)
    out = torch.empty((R, I), dtype=y_RI.dtype, device=y_RI.device) if out is None else out
    kept = (R, rstds(order, groups))
    rstd_RG = torch.empty(kept, dtype=torch.float32, device=y_RI.device) if rstd is None else rstd
    _check(y_RI, z_RI, out)
    block = triton.next_power_of_2(width)
    launch = launch or launch_of(FORWARD, block)
    if R:
        with torch.cuda.device_of(y_RI):
            _gate_norm_forward[triton.cdiv(R, launch.rows), pieces](
                y_RI, z_RI, weight_I, out, rstd_RG, R, y_RI.stride(0), z_RI.stride(0), out.stride(0), eps,
                ORDER=order, GATE=gate, I=I, WIDTH=width, ROWS=launch.rows, BLOCK=block, PART=part,
                num_warps=launch.warps,
            )
    return out, rstd_RG


def gate_norm_backward(
    dout_RI: Tensor, y_RI: Tensor, z_RI: Tensor, weight_I: Tensor | None, rstd_RG: Tensor, *, order: str,
    groups: int, eps: float, gate: str = "silu", dy: Tensor | None = None, dz: Tensor | None = None,
    launch: Launch | None = None, part: str = "whole", means: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dy, dz, dweight_I in the weight's dtype; None for order none), from what the forward had and its rstd.

    dy and dz are written where given (dy may be dout itself), else made in the dtypes of y and z. Equal
    inputs give equal bits: each program sums the rows it walks over, and one reduction adds up the programs.
    part, where the rows are pieces of what is normed: "means" writes `means` [R, G] of the gradients of what is normed
    times itself, and nothing else; "rest" reads them.
    """
    (R, I), (width, pieces) = y_RI.shape, _pieces(y_RI.shape[1], groups, order)
    dy = torch.empty((R, I), dtype=y_RI.dtype, device=y_RI.device) if dy is None else dy
    dz = torch.empty((R, I), dtype=z_RI.dtype, device=y_RI.device) if dz is None else dz
    _check(dout_RI, y_RI, z_RI, dy, dz)
    block = triton.next_power_of_2(width)
    read = (dout_RI, y_RI, z_RI) if weight_I is None else (dout_RI, y_RI, z_RI, weight_I)
    launch, P = persistent(launch or launch_of(BACKWARD, block), block, rows=R, pieces=pieces, read=read)
    weighs = order != "none" and part != "means"
    dweight_PI = torch.empty((P, I), dtype=torch.float32, device=y_RI.device) if weighs else None
    if R:
        with torch.cuda.device_of(y_RI):
            _gate_norm_backward[P, pieces](
                dout_RI, y_RI, z_RI, weight_I, rstd_RG, means, dy, dz, dweight_PI, R,
                dout_RI.stride(0), y_RI.stride(0), z_RI.stride(0), dy.stride(0), dz.stride(0),
                ORDER=order, GATE=gate, I=I, WIDTH=width, ROWS=launch.rows, BLOCK=block, STAGES=launch.stages,
                PART=part, num_warps=launch.warps, maxnreg=launch.registers,
            )
    return dy, dz, None if dweight_PI is None else column_sums(dweight_PI, weight_I.dtype)


def _pieces(channels: int, groups: int, order: str) -> tuple[int, int]:
    """(Channels of a piece that one program takes, how many pieces a row has)."""
    if order == "none":
        width = min(channels, PIECE)
        return width, triton.cdiv(channels, width)
    width = channels // groups
    if width * groups != channels or width > WIDEST_NORM:
        raise ValueError(
            f"the gated norm takes groups of equal width, at most {WIDEST_NORM} channels each, "
            f"not {channels} channels in {groups} groups"
        )
    return width, groups


def _check(*tensors: Tensor) -> None:
    shape = tensors[0].shape
    for t in tensors:
        if t.shape != shape or t.stride(1) != 1:
            raise ValueError(f"rows must be {list(shape)} with stride 1 inside, not {list(t.shape)}, {t.stride()}")


def rstds(order: str, groups: int) -> int:
    """How many a row has."""
    return 0 if order == "none" else groups
