"""The causal depthwise convolution of recurrent layers, with silu or without, forward and backward, in Triton.

In: rows of channels on a GPU, also a slice of a wider buffer, as the slot `conv` has them; out: its results, or
gradients. What is computed is written in `kinds/conv.py`; float32 inside, whatever the dtypes. Refuses (ValueError)
other than 2 to 8 taps. Slower, not refused: strides or a start that are no multiple of 16 bytes; channels that are
not innermost are copied first. `make_conv` and `make_plain_conv` give slots' functions; `forward` and `backward` are
for other parts.

Letters: B batch, T time, C channels, K taps, J = K - 1 earlier inputs, S = J + T, P programs of a channel.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import triton
from torch import Tensor

from mambadsl.kinds.conv import last_inputs
from mambadsl.parts.triton.conv_kernels import conv_backward, conv_forward
from mambadsl.parts.triton.ssd.kernels import documents, kernels
from mambadsl.parts.triton.sums import column_sums

#: Registers hold the taps, their gradients and two windows.
MOST_TAPS = 8
#: A shorter segment would read too much of its neighbours.
SHORTEST = 16


class Walk(NamedTuple):
    """Channels and segments of a program, rows it reads at a time, its warps, programs for each multiprocessor, and
    registers of a thread (None: as many as ptxas likes), so few that those programs fit. ahead: the next rows are
    asked for before these are worked on, in more registers."""

    channels: int
    lanes: int
    rows: int
    warps: int
    per_processor: int
    registers: int | None = None
    ahead: bool = False


FORWARD = Walk(128, 4, 8, 4, 7, 72)
BACKWARD = Walk(128, 4, 4, 4, 4, 128)


def forward(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, *, document_BT: Tensor | None = None,
    state_BCJ: Tensor | None = None, silu: bool = True, walk: Walk | None = None,
) -> Tensor:
    """silu(conv(x)), or conv(x), [B, T, C] in the dtype of x, contiguous.

    Raises ValueError for sizes that the kernels do not take.

    document_BT: int32; taps reach over equal numbers only, so number the documents of a row apart.
    state_BCJ: the inputs before the first one, of its document. walk: other than the table's.
    """
    x_BTC, weight_CK, document_BT = _readable(x_BTC, weight_CK, document_BT, state_BCJ)
    (B, T, C), K = x_BTC.shape, weight_CK.shape[1]
    y_BTC = torch.empty((B, T, C), dtype=x_BTC.dtype, device=x_BTC.device)
    if not y_BTC.numel():
        return y_BTC
    laid = _lay(walk or FORWARD, x_BTC, K)
    with torch.cuda.device_of(x_BTC):
        conv_forward[laid.grid](
            x_BTC, weight_CK, bias_C, document_BT, state_BCJ, y_BTC, B, T, laid.length, laid.segments,
            x_BTC.stride(0), y_BTC.stride(0), *_strides(state_BCJ), x_t=x_BTC.stride(1), y_t=y_BTC.stride(1),
            C=C, K=K, SILU=silu, **laid.settings,
        )
    return y_BTC


def backward(
    dy_BTC: Tensor, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, *, document_BT: Tensor | None = None,
    state_BCJ: Tensor | None = None, dx: Tensor | None = None, silu: bool = True, walk: Walk | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (written to `dx` where given), of the weights and then the bias in one flat tensor of their
    dtype [C * K + C] (without a bias [C * K]), and of the state. Equal inputs give equal bits: each program sums what
    it walks over, and one reduction adds up the programs."""
    x_BTC, weight_CK, document_BT = _readable(x_BTC, weight_CK, document_BT, state_BCJ)
    dy_BTC = dy_BTC if dy_BTC.stride(2) == 1 else dy_BTC.contiguous()
    (B, T, C), K = x_BTC.shape, weight_CK.shape[1]
    in_place = dx is not None and dx.stride(2) == 1
    into = dx if in_place else torch.empty((B, T, C), dtype=x_BTC.dtype, device=x_BTC.device)
    width = C * K + (0 if bias_C is None else C)
    dstate_BCJ = None if state_BCJ is None else torch.empty_like(state_BCJ)
    if not x_BTC.numel():
        return into, weight_CK.new_zeros(width), None if dstate_BCJ is None else dstate_BCJ.zero_()
    laid = _lay(walk or BACKWARD, x_BTC, K)
    partial_PW = torch.empty((laid.grid[1], width), dtype=torch.float32, device=x_BTC.device)
    with torch.cuda.device_of(x_BTC):
        conv_backward[laid.grid](
            dy_BTC, x_BTC, weight_CK, bias_C, document_BT, state_BCJ, into, dstate_BCJ, partial_PW,
            B, T, laid.length, laid.segments,
            dy_BTC.stride(0), x_BTC.stride(0), into.stride(0), *_strides(state_BCJ), *_strides(dstate_BCJ),
            dy_t=dy_BTC.stride(1), x_t=x_BTC.stride(1), dx_t=into.stride(1), C=C, K=K, SILU=silu,
            **laid.settings,
        )
    if dx is not None and not in_place:
        dx.copy_(into)
    return into if dx is None else dx, column_sums(partial_PW, weight_CK.dtype), dstate_BCJ


class _Laid(NamedTuple):
    grid: tuple[int, int]
    length: int
    segments: int
    settings: dict


def _lay(walk: Walk, x_BTC: Tensor, K: int) -> _Laid:
    """Segments of such a length that the programs fill the GPU once."""
    B, T, C = x_BTC.shape
    block = min(walk.channels, max(triton.next_power_of_2(C), 16))
    lanes = walk.lanes * (walk.channels // block)
    blocks = triton.cdiv(C, block)
    fit = max(1, _processors(x_BTC.device) * walk.per_processor // blocks) * lanes
    length = max(triton.cdiv(T, max(1, fit // B)), SHORTEST)
    length = triton.cdiv(length, walk.rows) * walk.rows
    segments = triton.cdiv(T, length)
    settings = dict(ROWS=walk.rows, LANES=lanes, BLOCK=block, FAST=x_BTC.is_cuda, AHEAD=walk.ahead)
    settings["num_warps"] = walk.warps
    if walk.registers is not None and K <= 4:
        settings["maxnreg"] = walk.registers
    return _Laid((blocks, triton.cdiv(B * segments, lanes)), length, segments, settings)


@functools.cache
def _processors(device: torch.device) -> int:
    """Of a small GPU where Triton's interpreter runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _readable(
    x_BTC: Tensor, weight_CK: Tensor, document_BT: Tensor | None, state_BCJ: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with channels innermost and taps and documents contiguous. ValueError for sizes that do not fit."""
    (B, T, C), K = x_BTC.shape, weight_CK.shape[1]
    if not 2 <= K <= MOST_TAPS:
        raise ValueError(f"the convolution takes 2 to {MOST_TAPS} taps, not {K}")
    for name, tensor, shape in (
        ("the weights", weight_CK, (C, K)), ("documents", document_BT, (B, T)), ("the state", state_BCJ, (B, C, K - 1)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for rows {[B, T, C]}, not {list(tensor.shape)}")
    x_BTC = x_BTC if x_BTC.stride(2) == 1 else x_BTC.contiguous()
    return x_BTC, weight_CK.contiguous(), None if document_BT is None else document_BT.contiguous()


def _strides(t_BCJ: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t_BCJ is None else t_BCJ.stride()


@torch.library.custom_op("mambadsl::causal_conv", mutates_args=())
def convolve(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Optional[Tensor], document_BT: Optional[Tensor],
    state_BCJ: Optional[Tensor], by: str, silu: bool = True,
) -> Tensor:
    """The convolution, or silu of it. by: whose kernels, as in `ssd/kernels.py`."""
    return kernels(by).conv.forward(
        x_BTC, weight_CK, bias_C, document_BT=document_BT, state_BCJ=state_BCJ, silu=silu
    )


@convolve.register_fake
def _(x_BTC, weight_CK, bias_C, document_BT, state_BCJ, by, silu=True):
    return x_BTC.new_empty(x_BTC.shape)


@torch.library.custom_op("mambadsl::causal_conv_backward", mutates_args=())
def _backward_op(
    dy_BTC: Tensor, x_BTC: Tensor, weight_CK: Tensor, bias_C: Optional[Tensor], document_BT: Optional[Tensor],
    state_BCJ: Optional[Tensor], by: str, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx_BTC, flat, dstate_BCJ = kernels(by).conv.backward(
        dy_BTC, x_BTC, weight_CK, bias_C, document_BT=document_BT, state_BCJ=state_BCJ, silu=silu
    )
    return dx_BTC, flat, x_BTC.new_empty(0) if dstate_BCJ is None else dstate_BCJ.contiguous()


@_backward_op.register_fake
def _(dy_BTC, x_BTC, weight_CK, bias_C, document_BT, state_BCJ, by, silu):
    weights = weight_CK.numel() + (0 if bias_C is None else bias_C.numel())
    dstate = x_BTC.new_empty(0) if state_BCJ is None else state_BCJ.new_empty(state_BCJ.shape)
    return x_BTC.new_empty(x_BTC.shape), weight_CK.new_empty(weights), dstate


def _save(ctx, inputs, output):
    *tensors, ctx.by, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy_BTC):
    x_BTC, weight_CK, bias_C, document_BT, state_BCJ = ctx.saved_tensors
    dx_BTC, flat, dstate_BCJ = _backward_op(
        dy_BTC, x_BTC, weight_CK, bias_C, document_BT, state_BCJ, ctx.by, ctx.silu
    )
    taps = weight_CK.numel()
    dbias_C = None if bias_C is None else flat[taps:].to(bias_C.dtype)
    dstate_BCJ = None if state_BCJ is None else dstate_BCJ
    return dx_BTC, flat[:taps].view_as(weight_CK), dbias_C, None, dstate_BCJ, None, None


convolve.register_autograd(_backward, setup_context=_save)


def make_conv() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of the slots `mamba2.conv`, `mamba1.conv` and their like: as `causal_conv` of `kinds/conv.py`."""
    return _made(silu=True)


def make_plain_conv() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of the slot `short_conv.conv`: as `plain_conv` of `kinds/conv.py`."""
    return _made(silu=False)


def _made(*, silu: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def conv(
        x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, segments_BT: Tensor | None = None,
        lengths_B: Tensor | None = None, state_BCJ: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """ValueError for sizes that the kernels do not take."""
        # Counted: of two documents with one number in a row, the second must not see the first.
        document_BT = documents(segments_BT)
        if state_BCJ is None:
            return convolve(x_BTC, weight_CK, bias_C, document_BT, None, "triton", silu), None
        J = weight_CK.shape[1] - 1
        state_BCJ = state_BCJ.to(x_BTC.dtype)
        y_BTC = convolve(x_BTC, weight_CK, bias_C, document_BT, state_BCJ, "triton", silu)
        read_BTC = x_BTC if segments_BT is not None else x_BTC[:, max(x_BTC.shape[1] - J, 0) :]
        before_BSC = torch.cat([state_BCJ.transpose(1, 2), read_BTC], dim=1)
        return y_BTC, last_inputs(before_BSC, J, segments_BT, lengths_B)

    return conv
