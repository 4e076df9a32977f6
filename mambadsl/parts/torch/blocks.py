"""FlexAttention block masks of causal, windowed, packed attention, from one number or two a block.

In: the tokens of a batch, where queries and keys are the same. Out: a BlockMask. Nothing of size [T, T] is made,
no shape depends on data and the host waits for nothing, unlike `create_block_mask`.
Letters: B batch, T time, J blocks of queries or keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mambadsl.kinds.tokens import Tokens

#: Tokens in a block, FlexAttention's own default.
BLOCK = 128


def block_mask(tokens: Tokens, *, window: int | None, keep: int = 0) -> BlockMask:
    """What `visible` shows of real tokens: of their own document, not later ones, not further back than window - 1, but
    for the first `keep` tokens of the document.

    Exact where positions rise by 1 from token to token of a document (`Tokens` makes no others). Padding sees
    the padding before it in its row and itself, so no row is empty.
    """
    segments_BT, positions_BT = tokens.segments_BT, tokens.positions_BT

    def seen(b, h, query, key):
        back, place = query - key, key
        shown = back >= 0
        if segments_BT is not None:
            shown = shown & (segments_BT[b, query] == segments_BT[b, key])
            back, place = positions_BT[b, query] - positions_BT[b, key], positions_BT[b, key]
        if window is None:
            return shown
        return shown & ((back < window) | (place < keep) if keep else back < window)

    some_BJJ, all_BJJ = block_pairs(tokens, window=window, keep=keep)
    some_kv, some_kv_index, some_q, some_q_index = _lists(some_BJJ & ~all_BJJ)
    all_kv, all_kv_index, all_q, all_q_index = _lists(all_BJJ)
    return BlockMask(
        seq_lengths=(tokens.length, tokens.length), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=seen,
        kv_num_blocks=some_kv, kv_indices=some_kv_index, full_kv_num_blocks=all_kv, full_kv_indices=all_kv_index,
        q_num_blocks=some_q, q_indices=some_q_index, full_q_num_blocks=all_q, full_q_indices=all_q_index,
    )


def block_pairs(tokens: Tokens, *, window: int | None, keep: int = 0) -> tuple[Tensor, Tensor]:
    """For each block of queries and block of keys: may any of the queries see any of the keys; does each see all.

    bool [B, J, J] each, B 1 without segments. The first may be true of pairs without a visible key, never false of
    one with; the second is exact, but false in the last, partial block.
    """
    T, device = tokens.length, tokens.positions_BT.device
    J = -(-T // BLOCK)
    block_J = torch.arange(J, device=device)
    back_JJ = block_J[:, None] - block_J
    some_BJJ, all_BJJ = (back_JJ >= 0)[None], (back_JJ > 0)[None]
    if tokens.segments_BT is None:
        positions_BT = torch.arange(T, device=device)[None]
    else:
        positions_BT = tokens.positions_BT
        low_BJ, high_BJ = _range(tokens.segments_BT, J)
        some_BJJ = some_BJJ & (low_BJ[:, :, None] <= high_BJ[:, None]) & (low_BJ[:, None] <= high_BJ[:, :, None])
        # One document in both blocks.
        all_BJJ = all_BJJ & (low_BJ[:, :, None] == high_BJ[:, None]) & (low_BJ[:, None] == high_BJ[:, :, None])
    if window is not None:
        low_BJ, high_BJ = _range(positions_BT, J)
        some_BJJ = some_BJJ & ((low_BJ[:, :, None] - high_BJ[:, None] < window) | (low_BJ[:, None] < keep))
        all_BJJ = all_BJJ & ((high_BJ[:, :, None] - low_BJ[:, None] < window) | (high_BJ[:, None] < keep))
    if T % BLOCK:
        whole_J = block_J < T // BLOCK
        all_BJJ = all_BJJ & whole_J[:, None] & whole_J
    return torch.broadcast_tensors(some_BJJ, all_BJJ)


def _range(x_BT: Tensor, J: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block, [B, J]; the missing end of the last block repeats the last token."""
    short = J * BLOCK - x_BT.shape[1]
    if short:
        x_BT = torch.cat((x_BT, x_BT[:, -1:].expand(-1, short)), 1)
    x_BJT = x_BT.unflatten(1, (J, BLOCK))
    return x_BJT.amin(2), x_BJT.amax(2)


@torch.library.custom_op("mambadsl::block_lists", mutates_args=())
def _lists(pairs_BJJ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of pairs of blocks (queries, keys): how many blocks of keys each block of queries has, int32 [B, 1, J], and
    which, first in [B, 1, J, J]; then how many blocks of queries each block of keys has, and which.

    An op, because FlexAttention's kernels step from row to row by the stride of the 1, which torch.compile chooses as
    it likes for tensors that it makes itself: rows would read each other's lists.
    """
    return *_listed(pairs_BJJ), *_listed(pairs_BJJ.transpose(1, 2))


@_lists.register_fake
def _(pairs_BJJ):
    B, J, _ = pairs_BJJ.shape
    counts, order = (pairs_BJJ.new_empty(s, dtype=torch.int32) for s in ((B, 1, J), (B, 1, J, J)))
    return counts, order, torch.empty_like(counts), torch.empty_like(order)


def _listed(pairs_BJJ: Tensor) -> tuple[Tensor, Tensor]:
    pairs_BJJ = pairs_BJJ.contiguous()
    order_BJJ = pairs_BJJ.int().argsort(dim=-1, descending=True, stable=True)
    return pairs_BJJ.sum(-1, dtype=torch.int32)[:, None], order_BJJ.int()[:, None]
