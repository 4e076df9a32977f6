"""The chunked scan of state-space duality in torch, for every kind whose heads decay by one number a token.

Dao and Gu, arXiv:2405.21060, algorithm of section 6; results match mamba_ssm. Letters: B batch, T time, H heads,
P channels of a head, N numbers of state a channel, G groups, R = H / G heads of a group, K = R * P their channels,
c chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambadsl.kinds.chunks import LONGEST_CHUNK, LOWEST_LOG_DECAY, decay, in_chunks, masks, running_sums
from mambadsl.kinds.rows import starts


def ssd(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, *, chunk: int,
    segments_BT: Tensor | None = None, state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan: for each head h, of group g,

        S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_t,g^T        y_t = S_t C_t,g + D_h x_t

    S starts from `state_BHPN` (zeros where None), and from zeros at every later document of a row.
    dt: float32, at least 0, and 0 at padding (the state stays as it is). Returns y_BTHP in the dtype of
    x, and the state after the last token, float32. Linear in T: matrix products inside chunks, a loop
    over chunks for the states.
    """
    (B, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
    R, Q = H // G, min(chunk, T, LONGEST_CHUNK)
    x_BTHP, dtype = x_BTHP.float(), x_BTHP.dtype

    document_BcQ = None if segments_BT is None else in_chunks(starts(segments_BT), Q).cumsum(2)
    sees_BcQQ, whole_BcQ, last_BcQ = masks(document_BcQ, Q, x_BTHP.device)
    log_decay_BcQH = in_chunks((dt_BTH * A_H).clamp_min(LOWEST_LOG_DECAY), Q)
    log_decay_BcHQ = running_sums(log_decay_BcQH, document_BcQ).transpose(2, 3)
    x_BcQHP = in_chunks(x_BTHP * dt_BTH[..., None], Q)
    B_BcGQN = in_chunks(B_BTGN.float(), Q).transpose(2, 3)
    C_BcGQN = in_chunks(C_BTGN.float(), Q).transpose(2, 3)
    total_BcH1 = log_decay_BcHQ[..., -1:]

    # Inside a chunk: y_i = sum over j <= i of (C_i . B_j) exp(log decay from j to i) dt_j x_j. Where j > i
    # the exponent would be positive: there it is clamped and the score is 0, and so is the gradient.
    score_BcGQQ = (C_BcGQN @ B_BcGQN.transpose(-1, -2)) * sees_BcQQ[:, :, None]
    decay_BcHQQ = decay(log_decay_BcHQ[..., :, None] - log_decay_BcHQ[..., None, :])
    weight_BcHQQ = (score_BcGQQ[:, :, :, None] * decay_BcHQQ.unflatten(2, (G, R))).flatten(2, 3)
    y_BcQHP = (weight_BcHQQ @ x_BcQHP.transpose(2, 3)).transpose(2, 3)

    # What each chunk adds to the state at its end; heads of a group are columns of one product.
    to_end_BcHQ = decay(total_BcH1 - log_decay_BcHQ)
    to_end_BcHQ = to_end_BcHQ if last_BcQ is None else to_end_BcHQ * last_BcQ[:, :, None]
    late_BcQHP = x_BcQHP * to_end_BcHQ.transpose(2, 3)[..., None]
    late_BcGQK = late_BcQHP.unflatten(3, (G, R)).flatten(4).transpose(2, 3)
    added_BcGNK = B_BcGQN.transpose(-1, -2) @ late_BcGQK

    # From chunk to chunk.
    from_start_BcHQ = log_decay_BcHQ.exp()
    from_start_BcHQ = from_start_BcHQ if whole_BcQ is None else from_start_BcHQ * whole_BcQ[:, :, None]
    kept_BcHP = from_start_BcHQ[..., -1:].expand(-1, -1, -1, P)
    kept_BcG1K = kept_BcHP.unflatten(2, (G, R)).flatten(3)[:, :, :, None]
    if state_BHPN is None:
        state_BGNK = torch.zeros_like(added_BcGNK[:, 0])
    else:
        state_BGNK = state_BHPN.float().unflatten(1, (G, R)).flatten(2, 3).transpose(2, 3)
    before = []
    for kept_BG1K, added_BGNK in zip(kept_BcG1K.unbind(1), added_BcGNK.unbind(1)):
        before.append(state_BGNK)
        state_BGNK = torch.addcmul(added_BGNK, kept_BG1K, state_BGNK)

    # What each token reads of the state before its chunk.
    read_BcQHP = (C_BcGQN @ torch.stack(before, 1)).transpose(2, 3).reshape(y_BcQHP.shape)
    y_BcQHP = torch.addcmul(y_BcQHP, read_BcQHP, from_start_BcHQ.transpose(2, 3)[..., None])
    y_BTHP = torch.addcmul(y_BcQHP.flatten(1, 2)[:, :T], x_BTHP, D_H.float()[:, None])
    return y_BTHP.to(dtype), state_BGNK.transpose(2, 3).reshape(B, H, P, N)
