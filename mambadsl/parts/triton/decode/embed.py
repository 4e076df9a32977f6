"""The beginning of a decoding step: the stream from the tokens, in one kernel whatever its dtype and scale.

    embed_step(token_B, weight_VD, *, multiplier, dtype) -> x_BD

In: token ids of any integer dtype and stride. Out: multiplier * W[token] in `dtype`, rounded once. A token outside of
the vocabulary gives NaN: nothing here can wait for the device to refuse it.

Letters: B batch, D d_model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.decode.device import begin, launch_options

#: Channels of one program.
BLOCK = 1024


def make_embed() -> Callable[..., Tensor]:
    """The slot `model.embed_step`."""

    def embed_step(token_B: Tensor, weight_VD: Tensor, *, multiplier: float, dtype: torch.dtype) -> Tensor:
        B, (V, D) = token_B.shape[0], weight_VD.shape
        x_BD = weight_VD.new_empty((B, D), dtype=dtype)
        _embed_kernel[(triton.cdiv(D, BLOCK), B)](
            token_B, weight_VD, x_BD, V, D, token_B.stride(0), float(multiplier), BLOCK=BLOCK, num_warps=4,
            **launch_options(x_BD),
        )
        return x_BD

    return embed_step


@triton.jit
def _embed_kernel(TOKEN, W, OUT, V, D, stride, multiplier, BLOCK: tl.constexpr, PDL: tl.constexpr):
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    begin(PDL)
    token = tl.load(TOKEN + row * stride).to(tl.int64)
    known = (token >= 0) & (token < V)
    x = tl.load(W + token * D + d, mask=(d < D) & known, other=float("nan")).to(tl.float32) * multiplier
    tl.store(OUT + row * D + d, x.to(OUT.dtype.element_ty), mask=d < D)
