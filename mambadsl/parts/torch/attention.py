"""Attention by torch's fused kernels: the slot `attention.core`, as `attend` defines it.

In: queries, keys and values with what their tokens are. Out: the mixed values. Per call, by what the host knows:

    plain causal rows                    SDPA (cuDNN, flash or memory-efficient), on any device
    window, documents or softcap         FlexAttention, which skips blocks where nothing is seen: long rows on CUDA,
                                         for training or in compiled code
    the same elsewhere, and with a past  SDPA with the mask of who sees whom, in slices of queries

Refuses nothing that the reference takes, save heads under 16 channels where FlexAttention is needed.
Letters: B batch, T time (queries), S keys, H query heads, K key/value heads, G = H / K, P head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from mambadsl.kinds.attend import visible
from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.torch.blocks import block_mask

#: Tried in this order; the rest stays behind them, so that float32 and odd widths work too.
BACKENDS: dict[str, tuple[SDPBackend, ...]] = {
    "auto": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    "cudnn": (SDPBackend.CUDNN_ATTENTION,),
    "flash": (SDPBackend.FLASH_ATTENTION,),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION,),
}
#: Up to this many tokens a mask of all pairs is small, and there are few blocks to leave out.
SHORT = 512
#: Queries whose mask, or with a softcap whose scores, are in memory at once.
MASKED_SLICE, CAPPED_SLICE = 2048, 256


def make_attention(*, backend: str = "auto") -> Callable[..., Tensor]:
    """A function for `attention.core`: (q_BTHP, k_BSKP, v_BSKP, queries, keys, *, scale, window, softcap, keep)
    -> [B, T, H, P], equal to `attend` within rounding.

    backend: what plain causal attention prefers, `auto`, `cudnn`, `flash` or `efficient`; another one
    is taken where the kernel cannot (dtype, head_dim). torch.compile(fullgraph=True) traces it, CUDA graphs
    capture it.
    """
    order = list(BACKENDS[backend])
    order += [b for b in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH) if b not in order]

    def attention(
        q_BTHP: Tensor, k_BSKP: Tensor, v_BSKP: Tensor, queries: Tokens, keys: Tokens, *, scale: float,
        window: int | None, softcap: float | None, keep: int = 0,
    ) -> Tensor:
        window = None if window is not None and keys is queries and window >= queries.length else window
        shape = dict(scale=scale, window=window, softcap=softcap, keep=keep)
        if keys is queries and queries.segments_BT is None and window is None and softcap is None:
            with _preferring(order, q_BTHP):
                return plain(q_BTHP, k_BSKP, v_BSKP, scale=scale)
        if keys is queries and q_BTHP.is_cuda and queries.length > SHORT and _worth_compiling():
            return flex(q_BTHP, k_BSKP, v_BSKP, queries, **shape)
        return masked(q_BTHP, k_BSKP, v_BSKP, queries, keys, **shape)

    return attention


def _worth_compiling() -> bool:
    """FlexAttention compiles for each length: fine for training batches, not for the prompts that users type."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _preferring(order: list[SDPBackend], q: Tensor) -> AbstractContextManager[None]:
    return sdpa_kernel(order, set_priority=True) if q.is_cuda else nullcontext()


def plain(q_BTHP: Tensor, k_BTKP: Tensor, v_BTKP: Tensor, *, scale: float) -> Tensor:
    """Causal attention within whole rows, by the SDPA backend in force."""
    H = q_BTHP.shape[2]
    if q_BTHP.dtype == torch.float32 and H != k_BTKP.shape[2]:
        # Of float32, only the backend that holds all scores in memory takes grouped heads.
        k_BTKP, v_BTKP = (t.repeat_interleave(H // t.shape[2], 2) for t in (k_BTKP, v_BTKP))
    q_BHTP, k_BKTP, v_BKTP = (t.transpose(1, 2) for t in (q_BTHP, k_BTKP, v_BTKP))
    grouped = H != k_BTKP.shape[2]
    return F.scaled_dot_product_attention(
        q_BHTP, k_BKTP, v_BKTP, is_causal=True, scale=scale, enable_gqa=grouped
    ).transpose(1, 2)


def flex(
    q_BTHP: Tensor, k_BTKP: Tensor, v_BTKP: Tensor, tokens: Tokens, *, scale: float, window: int | None,
    softcap: float | None, keep: int = 0,
) -> Tensor:
    """Attention through FlexAttention, compiled by itself where the caller is not.

    Raises ValueError for heads under 16 channels, which its kernels do not take.
    """
    P = q_BTHP.shape[3]
    if P < 16:
        raise ValueError(f"FlexAttention needs head_dim >= 16 for windows, documents and softcaps, not {P}")
    q_BHTP, k_BKTP, v_BKTP = (t.transpose(1, 2) for t in (q_BTHP, k_BTKP, v_BTKP))

    def capped(score, b, h, query, key):
        return softcap * torch.tanh(score / softcap)

    run = flex_attention if torch.compiler.is_compiling() else _compiled
    grouped = q_BHTP.shape[1] != k_BKTP.shape[1]
    return run(
        q_BHTP, k_BKTP, v_BKTP, score_mod=None if softcap is None else capped,
        block_mask=block_mask(tokens, window=window, keep=keep), scale=scale, enable_gqa=grouped,
    ).transpose(1, 2)


def _compiled(*tensors: Tensor, **how: Any) -> Tensor:
    """flex_attention compiled by itself: as it is, it holds all scores in memory.

    Each length, window, softcap and dtype compiles anew, more often than torch's limit of 8; past the limit of
    here, fullgraph makes torch raise rather than hold all scores.
    """
    with torch._dynamo.config.patch(recompile_limit=128, specialize_int=True):
        return _flex()(*tensors, **how)


@cache
def _flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def masked(
    q_BTHP: Tensor, k_BSKP: Tensor, v_BSKP: Tensor, queries: Tokens, keys: Tokens, *, scale: float,
    window: int | None, softcap: float | None, keep: int = 0,
) -> Tensor:
    """Attention under the bool mask of `visible` for any queries and keys, a slice of queries at a time.

    The G heads that share keys become G * T queries of one head, so keys are never repeated.
    """
    K = k_BSKP.shape[2]
    k_BKSP, v_BKSP = k_BSKP.transpose(1, 2), v_BSKP.transpose(1, 2)
    q_BKGTP = q_BTHP.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)
    slices, size = [], MASKED_SLICE if softcap is None else CAPPED_SLICE
    for start in range(0, queries.length, size):
        part = slice(start, start + size)
        some = Tokens(
            queries.positions_BT[:, part], None if queries.segments_BT is None else queries.segments_BT[:, part]
        )
        given = q_BKGTP[:, :, :, part], k_BKSP, v_BKSP, visible(some, keys, window=window, keep=keep), scale
        if softcap is None:
            slices.append(_masked(*given))
        else:
            # Nothing is random here; looking at the generator would stop a CUDA graph's capture.
            slices.append(checkpoint(_capped, *given, softcap, use_reentrant=False, preserve_rng_state=False))
    y_BKGTP = slices[0] if len(slices) == 1 else torch.cat(slices, 3)
    return y_BKGTP.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _masked(q_BKGTP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    (G, T), mask_B1MS = q_BKGTP.shape[2:4], mask_BTS.repeat(1, q_BKGTP.shape[2], 1)[:, None]
    return F.scaled_dot_product_attention(
        q_BKGTP.flatten(2, 3), k_BKSP, v_BKSP, attn_mask=mask_B1MS, scale=scale
    ).unflatten(2, (G, T))


def _capped(
    q_BKGTP: Tensor, k_BKSP: Tensor, v_BKSP: Tensor, mask_BTS: Tensor, scale: float, softcap: float
) -> Tensor:
    """The scores, in float32, are computed again for the gradient."""
    scores = q_BKGTP.float() @ k_BKSP[:, :, None].float().transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    share = scores.masked_fill(~mask_BTS[:, None, None], float("-inf")).softmax(-1)
    return share.to(v_BKSP.dtype) @ v_BKSP[:, :, None]
