"""The causal depthwise convolution of recurrent layers, in torch: documents, padding, and its state.

y_t = bias + sum_k weight[:, K - 1 - k] * x_{t-k}, over inputs of the same document only; `causal_conv` gives its silu.
Matches causal_conv1d. Letters: B batch, T time, C channels, K taps, J = K - 1 earlier inputs (the state).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.rows import starts


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None, state_BCJ: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """silu of the convolution, [B, T, C] in the dtype of x, summed in float32; and the inputs that come
    before the next token, [B, C, J], None without a state.

    segments_BT, lengths_B: as in `Rows`. state_BCJ: the inputs before the first token.
    """
    y_BTC, after_BCJ = _sums(x_BTC, weight_CK, bias_C, segments_BT, lengths_B, state_BCJ)
    return F.silu(y_BTC).to(x_BTC.dtype), after_BCJ


def plain_conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None, state_BCJ: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `causal_conv`, without the silu."""
    y_BTC, after_BCJ = _sums(x_BTC, weight_CK, bias_C, segments_BT, lengths_B, state_BCJ)
    return y_BTC.to(x_BTC.dtype), after_BCJ


def _sums(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, segments_BT: Tensor | None, lengths_B: Tensor | None,
    state_BCJ: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution in float32, and the state after it."""
    T, J = x_BTC.shape[1], weight_CK.shape[1] - 1
    if state_BCJ is not None:
        x_BTC = torch.cat([state_BCJ.transpose(1, 2).to(x_BTC.dtype), x_BTC], dim=1)
    reach_BT = None if segments_BT is None else reach(segments_BT, J)
    bias_C = None if bias_C is None else bias_C.float()
    y_BTC = Taps.apply(x_BTC.float(), weight_CK.float(), bias_C, reach_BT, T)
    return y_BTC, None if state_BCJ is None else last_inputs(x_BTC, J, segments_BT, lengths_B)


def reach(segments_BT: Tensor, J: int) -> Tensor:
    """How many inputs before each one are of its document; those of the state are."""
    B, T = segments_BT.shape
    index_BT = torch.arange(T, device=segments_BT.device).expand(B, T)
    return index_BT - torch.where(starts(segments_BT), index_BT, -J).cummax(1).values


def last_inputs(x_BSC: Tensor, J: int, segments_BT: Tensor | None, lengths_B: Tensor | None) -> Tensor:
    """The J inputs up to the last real token, from the state's inputs and the row's (S = J + T): zeros for
    those of an earlier document. [B, C, J]"""
    if segments_BT is None:
        return x_BSC[:, x_BSC.shape[1] - J :].transpose(1, 2)
    B, _, C = x_BSC.shape
    segments_BS = torch.cat([segments_BT[:, :1].expand(B, J), segments_BT], dim=1)
    index_BJ = lengths_B[:, None] + torch.arange(J, device=x_BSC.device)
    same_BJ = segments_BS.gather(1, index_BJ) == segments_BT[:, -1:]
    last_BJC = x_BSC.gather(1, index_BJ[..., None].expand(B, J, C))
    return torch.where(same_BJ[..., None], last_BJC, 0).transpose(1, 2)


class Taps(torch.autograd.Function):
    """The sum over taps, by shifted multiply-adds in place: on CPUs half the time of a grouped conv1d,
    in the layout that projections give and scans take.

    x_BSC: S = T inputs, or J + T with those of the state before them. reach_BT: a tap that looks further back
    reads zero.
    """

    @staticmethod
    def forward(ctx, x_BSC, weight_CK, bias_C, reach_BT, T):
        B, S, C = x_BSC.shape
        weight_KC = weight_CK.t().contiguous()
        y_BTC = x_BSC.new_zeros(B, T, C) if bias_C is None else bias_C.expand(B, T, C).clone()
        for weight_C, read, write, mask in _taps(weight_KC, S, T, reach_BT):
            x = x_BSC[:, read]
            y_BTC[:, write].addcmul_(x if mask is None else x * mask, weight_C)
        ctx.save_for_backward(x_BSC, weight_KC, reach_BT)
        ctx.T, ctx.has_bias = T, bias_C is not None
        return y_BTC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_BTC):
        x_BSC, weight_KC, reach_BT = ctx.saved_tensors
        dx_BSC, newest_first = torch.zeros_like(x_BSC), []
        for weight_C, read, write, mask in _taps(weight_KC, x_BSC.shape[1], ctx.T, reach_BT):
            dy = dy_BTC[:, write] if mask is None else dy_BTC[:, write] * mask
            dx_BSC[:, read].addcmul_(dy, weight_C)
            newest_first.append((x_BSC[:, read] * dy).sum((0, 1)))
        dweight_CK = torch.stack(newest_first[::-1], 1)
        return dx_BSC, dweight_CK, dy_BTC.sum((0, 1)) if ctx.has_bias else None, None, None


def _taps(weight_KC: Tensor, S: int, T: int, reach_BT: Tensor | None):
    """Each tap from the newest input back: its weights, which inputs it reads, which outputs it adds to, and
    a mask [B, t, 1] of those inputs."""
    for lag, weight_C in enumerate(weight_KC.flip(0)):
        first = min(max(lag - (S - T), 0), T)
        mask = None if reach_BT is None or lag == 0 else (reach_BT[:, first:, None] >= lag).to(weight_C.dtype)
        yield weight_C, slice(first + S - T - lag, S - lag), slice(first, T), mask
