"""The end of a decoding step: final norm and logits, and the most likely token's way to the next step and the history.

    head_step(norm, x_BD, weight_VD, *, multiplier, softcap) -> float32 logits_BV
    next_token(logits_BV, token_B, history_TB, written_1) -> None

In: the residual stream x_BD; logits. Out: logits_BV; or token_B int64, the history's row `written_1`, and that count
one higher, all in place. NaN counts as the most likely, as in torch. Refuses (ValueError) a norm that is no RMS norm.

Letters: B batch, T tokens of the history, D d_model, V vocab, L runs of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.decode.configs import paths_for
from mambadsl.parts.triton.decode.device import begin, launch_options
from mambadsl.parts.triton.decode.linear import After, norm_linear
from mambadsl.parts.triton.decode.steps import norm_of

#: Logits that one program compares.
RUN = 1024


def make_head() -> Callable[..., Tensor]:
    """The slot `model.head_step`."""

    def head_step(norm: Any, x_BD: Tensor, weight_VD: Tensor, *, multiplier: float, softcap: float | None) -> Tensor:
        if softcap is None:
            return logits(norm, x_BD, weight_VD, scale=multiplier, dtype=torch.float32)
        logits_BV = logits(norm, x_BD, weight_VD, scale=multiplier / softcap, dtype=torch.float32)
        return logits_BV.tanh_().mul_(softcap)

    return head_step


def make_next_token() -> Callable[..., None]:
    """The slot `model.next_token`."""
    return next_token


def logits(
    norm: Any, x_BD: Tensor, weight_VD: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None,
    path: str | None = None,
) -> Tensor:
    """scale * (W norm(x)) [B, V]; norm: a `kinds.norm.Norm`. dtype: float32 where the kernel sums in it (small
    batches), else the weights', unless given."""
    path = path or paths_for(x_BD.shape[0])[0]
    if dtype is None and path != "cublas":
        dtype = torch.float32
    return norm_linear(x_BD, weight_VD, norm=norm_of(norm), after=After(out_scale=scale), dtype=dtype, path=path)


def most_likely(logits_BV: Tensor) -> Tensor:
    """argmax of each row, the first of equals; int64 [B]."""
    token_B = torch.empty(logits_BV.shape[0], dtype=torch.int64, device=logits_BV.device)
    _choose(logits_BV, token_B)
    return token_B


def next_token(logits_BV: Tensor, token_B: Tensor, history_TB: Tensor, written_1: Tensor) -> None:
    """token_B, history_TB[written_1] = argmax of each row; written_1 += 1. All int64, in place."""
    _choose(logits_BV, token_B, history_TB, written_1)


def _choose(
    logits_BV: Tensor, token_B: Tensor, history_TB: Tensor | None = None, written_1: Tensor | None = None
) -> None:
    B, V = logits_BV.shape
    L = triton.cdiv(V, RUN)
    best = torch.empty((B, L), dtype=torch.float32, device=logits_BV.device)
    where = torch.empty((B, L), dtype=torch.int32, device=logits_BV.device)
    keep, options = history_TB is not None, launch_options(logits_BV)
    _runs_kernel[(L, B)](
        logits_BV, best, where, written_1, V, logits_BV.stride(0), L, BLOCK=RUN, KEEP=keep, num_warps=4, **options
    )
    _best_kernel[(B,)](
        best, where, token_B, history_TB, written_1, L, history_TB.stride(0) if keep else 0,
        BLOCK=triton.next_power_of_2(L), KEEP=keep, num_warps=1, **options,
    )


@triton.jit
def _runs_kernel(
    X, BEST, WHERE, WRITTEN, V, stride, L, BLOCK: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr
):
    run = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    v = run * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    x = tl.load(X + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    # No comparison holds for NaN: the place found could be behind the row.
    x = tl.where(x == x, x, float("inf"))
    tl.store(BEST + row * L + run, tl.max(x, 0))
    tl.store(WHERE + row * L + run, run * BLOCK + tl.argmax(x, 0))
    if KEEP:
        # Counted here, where nobody reads it, since the programs of the next kernel all do.
        if (run == 0) & (row == 0):
            tl.store(WRITTEN, tl.load(WRITTEN) + 1)


@triton.jit
def _best_kernel(
    BEST, WHERE, TOKEN, HISTORY, WRITTEN, L, stride, BLOCK: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    begin(PDL)
    run = tl.argmax(tl.load(BEST + row * L + i, mask=i < L, other=float("-inf")), 0)
    token = tl.load(WHERE + row * L + run).to(tl.int64)
    tl.store(TOKEN + row, token)
    if KEEP:
        tl.store(HISTORY + (tl.load(WRITTEN) - 1) * stride + row, token)
