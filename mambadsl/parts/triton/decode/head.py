"""The end of a decoding step: final norm, logits, and the most likely token.

In: the residual stream x_BD. Out: logits_BV in float32 (or another dtype), token_B int64. Letters: B batch, D d_model,
V vocab, L runs of the vocabulary.
"""

from __future__ import annotations

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
    B, V = logits_BV.shape
    L = triton.cdiv(V, RUN)
    best = torch.empty((B, L), dtype=torch.float32, device=logits_BV.device)
    where = torch.empty((B, L), dtype=torch.int32, device=logits_BV.device)
    token_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    options = launch_options(logits_BV)
    _runs_kernel[(L, B)](logits_BV, best, where, V, logits_BV.stride(0), L, BLOCK=RUN, num_warps=4, **options)
    _best_kernel[(B,)](best, where, token_B, L, BLOCK=triton.next_power_of_2(L), num_warps=1, **options)
    return token_B


@triton.jit
def _runs_kernel(X, BEST, WHERE, V, stride, L, BLOCK: tl.constexpr, PDL: tl.constexpr):
    run = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    v = run * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    x = tl.load(X + row * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    tl.store(BEST + row * L + run, tl.max(x, 0))
    tl.store(WHERE + row * L + run, run * BLOCK + tl.argmax(x, 0))


@triton.jit
def _best_kernel(BEST, WHERE, TOKEN, L, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    begin(PDL)
    run = tl.argmax(tl.load(BEST + row * L + i, mask=i < L, other=float("-inf")), 0)
    tl.store(TOKEN + row, tl.load(WHERE + row * L + run).to(tl.int64))
