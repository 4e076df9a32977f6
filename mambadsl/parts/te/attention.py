"""Attention by Transformer Engine's DotProductAttention (cuDNN): the slot `attention.core`, as `attend` defines it.

In: queries, keys and values with what their tokens are. Out: the mixed values. It does causal rows, windowed or not,
in bfloat16 and float16. Packed documents, a past, and a softcap go to torch's kernels (`parts/torch/attention.py`):
where a document begins is known to the device only, and Transformer Engine's packed form wants a list of fixed length.
Letters: B batch, T time, S keys, H query heads, K key/value heads, P head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from mambadsl.kinds.tokens import Tokens
from mambadsl.parts.te.load import load
from mambadsl.parts.torch.attention import make_attention as make_torch_attention


def make_attention() -> Callable[..., Tensor]:
    """A function for `attention.core`: (q_BTHP, k_BSKP, v_BSKP, queries, keys, *, scale, window, softcap)
    -> [B, T, H, P]. ImportError without Transformer Engine; torch.compile breaks its graph around the call."""
    load()
    other = make_torch_attention()

    def attention(
        q_BTHP: Tensor, k_BSKP: Tensor, v_BSKP: Tensor, queries: Tokens, keys: Tokens, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:
        window = None if window is not None and keys is queries and window >= queries.length else window
        if keys is not queries or queries.segments_BT is not None or softcap is not None:
            return other(q_BTHP, k_BSKP, v_BSKP, queries, keys, scale=scale, window=window, softcap=softcap)
        return _rows(q_BTHP, k_BSKP, v_BSKP, scale=scale, window=window)

    return attention


@torch.compiler.disable
def _rows(q_BTHP: Tensor, k_BTKP: Tensor, v_BTKP: Tensor, *, scale: float, window: int | None) -> Tensor:
    if q_BTHP.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"Transformer Engine's attention computes in bfloat16 or float16, not in {q_BTHP.dtype}")
    (_, _, H, P), K = q_BTHP.shape, k_BTKP.shape[2]
    # Of views into one buffer it would guess the layout from their addresses.
    q_BTHP, k_BTKP, v_BTKP = (t.contiguous() for t in (q_BTHP, k_BTKP, v_BTKP))
    back = -1 if window is None else window - 1
    return _core(H, K, P, scale)(q_BTHP, k_BTKP, v_BTKP, window_size=(back, 0)).view(q_BTHP.shape)


@cache
def _core(heads: int, kv_heads: int, head_dim: int, scale: float) -> nn.Module:
    """One for all layers alike: it has no parameters."""
    return load().DotProductAttention(
        heads, head_dim, num_gqa_groups=kv_heads, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="causal",
        softmax_scale=scale,
    )
