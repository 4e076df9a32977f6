"""Experts by grouped matrix products: the slot `moe.experts`, as `run_experts` defines it.

In: tokens, their experts and weights, the experts' matrices, all bfloat16 but the weights. Out: each token's
weighted sum. The host never learns how many tokens an expert has, so a CUDA graph can capture it.
Refuses other dtypes, and widths that are no multiple of 8 (16 bytes).
Letters: N tokens, K top_k, M = N * K jobs, E experts, L width in and out, F hidden width (2F where gated).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.activations import activate


def make_experts() -> Callable[..., Tensor]:
    """A function for `moe.experts`: `grouped_experts`."""
    return grouped_experts


def grouped_experts(
    x_NL: Tensor, index_NK: Tensor, weight_NK: Tensor, up_EFL: Tensor, down_ELF: Tensor, *, act: str, gated: bool
) -> Tensor:
    """The weighted sum of each token's experts, [N, L] bfloat16, summed in float32; experts without tokens
    are fine.

    Raises ValueError for a dtype or width that torch's grouped_mm does not take.
    """
    _check(x_NL, up_EFL, down_ELF)
    experts, top_k = up_EFL.shape[0], index_NK.shape[1]
    expert_M, order_M = index_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(expert_M, torch.arange(experts, device=x_NL.device), right=True).int()
    place_M = torch.empty_like(order_M).scatter(0, order_M, torch.arange(order_M.numel(), device=x_NL.device))
    x_ML = Dispatch.apply(x_NL, order_M, place_M, top_k)
    h_MF = F.grouped_mm(x_ML, up_EFL.transpose(1, 2), offs=ends_E)
    h_MF = activate(h_MF, act=act, gated=gated).contiguous()
    y_ML = F.grouped_mm(h_MF, down_ELF.transpose(1, 2), offs=ends_E)
    y_NKL = Combine.apply(y_ML, order_M, place_M).unflatten(0, (-1, top_k))
    return (y_NKL * weight_NK[..., None]).sum(1).to(x_NL.dtype)


def _check(x_NL: Tensor, up_EFL: Tensor, down_ELF: Tensor) -> None:
    dtypes = {t.dtype for t in (x_NL, up_EFL, down_ELF)}
    if dtypes != {torch.bfloat16}:
        raise ValueError(f"grouped_mm computes in bfloat16, not in {', '.join(sorted(map(str, dtypes)))}")
    widths = dict(input=up_EFL.shape[2], hidden=down_ELF.shape[2])
    uneven = [f"{name} {width}" for name, width in widths.items() if width % 8]
    if uneven:
        raise ValueError(f"grouped_mm needs widths that are multiples of 8, not {' and '.join(uneven)}")


class Dispatch(torch.autograd.Function):
    """Each job's token. Its gradient gathers and sums: index_put would sort, or add in any order."""

    @staticmethod
    def forward(ctx, x_NL, order_M, place_M, top_k):
        ctx.save_for_backward(place_M)
        ctx.top_k = top_k
        return x_NL[order_M // top_k]

    @staticmethod
    def backward(ctx, dx_ML):
        (place_M,) = ctx.saved_tensors
        return dx_ML[place_M].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Results in the order of the tokens again; the gradient goes back by the inverse permutation."""

    @staticmethod
    def forward(ctx, y_ML, order_M, place_M):
        ctx.save_for_backward(order_M)
        return y_ML[place_M]

    @staticmethod
    def backward(ctx, dy_ML):
        (order_M,) = ctx.saved_tensors
        return dy_ML[order_M], None, None
