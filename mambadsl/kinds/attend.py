"""Softmax attention over what each token may see, in torch: the reference of every kind's slot `core`.

Letters: B batch, T time (queries), S keys (past ones too), H query heads, K key/value heads, P channels of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.tokens import Tokens


def attend(
    q_BTHP: Tensor,
    k_BSKP: Tensor,
    v_BSKP: Tensor,
    queries: Tokens,
    keys: Tokens,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None = None,
    keep: int = 0,
) -> Tensor:
    """Attention of each token to the visible ones of its document, itself included: [B, T, H, P].

    queries: the batch's tokens. keys: what the S keys are; the same object as `queries` where there is
    no past. softcap: scores become softcap * tanh(score / softcap), in float32. sinks: of each head, the score of one
    more key, which is always seen and whose value is 0. keep: the first so many tokens of a document are seen through
    any window.
    """
    plain = keys is queries and queries.segments_BT is None and (window is None or window >= queries.length)
    fast = softcap is None and sinks_H is None
    mask_B1TS = None if plain and fast else visible(queries, keys, window=window, keep=keep)[:, None]
    q_BHTP, k_BKSP, v_BKSP = (t.transpose(1, 2) for t in (q_BTHP, k_BSKP, v_BSKP))
    if fast:
        grouped = q_BHTP.shape[1] != k_BKSP.shape[1]
        y_BHTP = F.scaled_dot_product_attention(
            q_BHTP, k_BKSP, v_BKSP, attn_mask=mask_B1TS, is_causal=plain, scale=scale, enable_gqa=grouped
        )
    else:
        k_BHSP, v_BHSP = (t.repeat_interleave(q_BHTP.shape[1] // t.shape[1], 1) for t in (k_BKSP, v_BKSP))
        scores_BHTS = q_BHTP.float() @ k_BHSP.float().transpose(2, 3) * scale
        if softcap is not None:
            scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
        scores_BHTS = scores_BHTS.masked_fill(~mask_B1TS, float("-inf"))
        if sinks_H is not None:
            sinks_BHT1 = sinks_H.float()[:, None, None].expand(*scores_BHTS.shape[:3], 1)
            scores_BHTS = torch.cat((scores_BHTS, sinks_BHT1), -1)
        share_BHTS = scores_BHTS.softmax(-1)[..., : k_BHSP.shape[2]]
        y_BHTP = share_BHTS.to(v_BHSP.dtype) @ v_BHSP
    return y_BHTP.transpose(1, 2)


def visible(queries: Tokens, keys: Tokens, *, window: int | None, keep: int = 0) -> Tensor:
    """Which keys a query sees, bool [B, T, S]: its own document's, up to its own position, window - 1 back, and the
    first `keep`.

    Padding sees padding, itself at least, so that no row is empty: softmax of nothing is not finite.
    """
    query_BT1, key_B1S = queries.positions_BT[:, :, None], keys.positions_BT[:, None]
    mask_BTS = key_B1S <= query_BT1
    if window is not None:
        mask_BTS = mask_BTS & ((key_B1S > query_BT1 - window) | (key_B1S < keep))
    if queries.segments_BT is not None or keys.segments_BT is not None:
        mask_BTS = mask_BTS & (segments(queries)[:, :, None] == segments(keys)[:, None])
    return mask_BTS


def segments(tokens: Tokens) -> Tensor:
    if tokens.segments_BT is not None:
        return tokens.segments_BT
    return torch.zeros_like(tokens.positions_BT, dtype=torch.int32)
