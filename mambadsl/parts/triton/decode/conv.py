"""The causal convolution of Mamba-2 for one token a row: alone in a kernel, and as pieces of others.

In: in_proj's output zx_BE = [z | x | B | C | dt] and the last inputs conv_BCJ, oldest first, with any strides (channels
innermost are read fastest). Out: silu(convolution) of [x | B | C] in float32; conv_BCJ moves on by one token, in place.
Definition: `kinds/conv.py`. Small batches leave the sum to the mixer's kernel and the moving on to the one after it.

Letters: B batch, I d_inner, S width of B and of C, C = I + 2S channels, J taps - 1, K taps, E in_proj channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.decode.device import begin, launch_options, silu

#: Channels that one program convolves.
BLOCK = 256


@dataclass(frozen=True)
class Shift:
    """A convolution's state conv_BCJ that takes in the token of zx_BE. d_inner, bc: widths of z and x, of B and C.
    scales: of x, B and C. Without a state: nothing to do."""

    zx_BE: Tensor | None = None
    conv_BCJ: Tensor | None = None
    d_inner: int = 0
    bc: int = 0
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def taps(self) -> int:
        return 0 if self.conv_BCJ is None else self.conv_BCJ.shape[2] + 1

    def arguments(self, like: Tensor) -> tuple[tuple[Tensor, Tensor], tuple]:
        """The tensors and the numbers that a kernel takes for it."""
        if self.conv_BCJ is None:
            return (like, like), (0, 0, 0, 0, 0, 0, 0, *map(float, self.scales))
        sizes = self.d_inner, self.bc, self.conv_BCJ.shape[1], self.zx_BE.stride(0), *self.conv_BCJ.stride()
        return (self.zx_BE, self.conv_BCJ), (*sizes, *map(float, self.scales))


NO_SHIFT = Shift()


def convolve(shift: Shift, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """silu(convolution) [B, C], float32; the state has moved on afterwards."""
    (B, C, _), (tensors, sizes) = shift.conv_BCJ.shape, shift.arguments(shift.zx_BE)
    if not weight_CK.is_contiguous():
        raise ValueError("the convolution's weight must be contiguous")
    xbc_BC = torch.empty((B, C), dtype=torch.float32, device=weight_CK.device)
    _conv_kernel[(triton.cdiv(C, BLOCK), B)](
        *tensors, weight_CK, bias_C, xbc_BC, *sizes, BIAS=bias_C is not None, TAPS=shift.taps, BLOCK=BLOCK,
        num_warps=2, **launch_options(weight_CK),
    )
    return xbc_BC


@triton.jit
def past_sum(
    CONV, W, BIAS_C, c, mask, conv_channel, conv_tap, BIAS: tl.constexpr, TAPS: tl.constexpr, MOVE: tl.constexpr
):
    """The sum over channels c of the row at CONV without the new token, and that token's weight. MOVE: the row makes
    room for it."""
    total = tl.zeros(c.shape, tl.float32)
    if BIAS:
        total += tl.load(BIAS_C + c, mask=mask).to(tl.float32)
    for j in tl.static_range(TAPS - 1):
        past = tl.load(CONV + c * conv_channel + j * conv_tap, mask=mask)
        total += past.to(tl.float32) * tl.load(W + c * TAPS + j, mask=mask).to(tl.float32)
        if MOVE and j > 0:
            tl.store(CONV + c * conv_channel + (j - 1) * conv_tap, past, mask=mask)
    return total, tl.load(W + c * TAPS + TAPS - 1, mask=mask).to(tl.float32)


@triton.jit
def _new(ZX, row, c, mask, I, S, zx_stride, x_scale, B_scale, C_scale):
    new = tl.load(ZX + row * zx_stride + I + c, mask=mask, other=0.0).to(tl.float32)
    return new * tl.where(c < I, x_scale, tl.where(c < I + S, B_scale, C_scale))


@triton.jit
def shift_conv(
    ZX, CONV, row, c, mask, I, S, zx_stride, conv_row, conv_channel, conv_tap, x_scale, B_scale, C_scale,
    TAPS: tl.constexpr,
):
    """The state of channels c moves on by one token. The mixer reads B and C of a group in many programs, so whatever
    kernel follows it does this."""
    new = _new(ZX, row, c, mask, I, S, zx_stride, x_scale, B_scale, C_scale)
    kept = CONV + row * conv_row + c * conv_channel
    for j in tl.static_range(TAPS - 2):
        tl.store(kept + j * conv_tap, tl.load(kept + (j + 1) * conv_tap, mask=mask, other=0.0), mask=mask)
    tl.store(kept + (TAPS - 2) * conv_tap, new.to(CONV.dtype.element_ty), mask=mask)


@triton.jit
def _conv_kernel(
    ZX, CONV, W, BIAS_C, XBC, I, S, C, zx_stride, conv_row, conv_channel, conv_tap, x_scale, B_scale, C_scale,
    BIAS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    # Nobody else touches this state, so it moves on while the kernel before this one ends.
    total, weight = past_sum(
        CONV + row * conv_row, W, BIAS_C, c, mask, conv_channel, conv_tap, BIAS, TAPS, True
    )
    begin(PDL)
    new = _new(ZX, row, c, mask, I, S, zx_stride, x_scale, B_scale, C_scale)
    last = CONV + row * conv_row + c * conv_channel + (TAPS - 2) * conv_tap
    tl.store(last, new.to(CONV.dtype.element_ty), mask=mask)
    tl.store(XBC + row * C + c, silu(total + new * weight), mask=mask)
