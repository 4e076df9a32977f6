"""The chunked delta rule, in torch: what the scans of Gated DeltaNet and of Kimi Delta Attention share.

Letters: B batch, T time, H heads, E key_dim, P value_dim, X what has a decay of its own (1: a head, E: its every
channel), c chunks, Q tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mambadsl.kinds.chunks import LOWEST_LOG_DECAY, decay, in_chunks, masks, running_sums
from mambadsl.kinds.rows import starts

#: (q_BcHQE, k_BcHQE, sums of log decays up to each token BcHQX, which tokens a token sees) -> products [B, c, H, Q, Q]
#: of each token's query, and of its key, with the key of each that it sees, decayed by what lies between; 0 elsewhere.
Pairs = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def unit(x: Tensor, eps: float) -> Tensor:
    """float32 vectors of length 1 along the last axis; eps: added to the squared length."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def delta_rule(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHP: Tensor, log_decay_BTHX: Tensor, beta_BTH: Tensor, *, pairs: Pairs, Q: int,
    segments_BT: Tensor | None, state_BHEP: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """For each head

        S = exp(log_decay_t) S_{t-1}        S_t = S + k_t beta_t (v_t - k_t S)        y_t = q_t S_t

    where the decay is one number, or one for each of S's E rows. S starts from `state_BHEP` (zeros where None), and
    from zeros at every later document of a row. log_decay: at most 0; both it and beta 0 at padding (the state stays
    as it is). Returns y_BTHP in the dtype of v, and the state after the last token, float32. Linear in T: in a chunk
    the corrections beta (v - k S) of all tokens are the solution of one triangular system (arXiv:2412.06464, section
    3.3), and a loop over chunks carries the state.
    """
    (B, T, H, P), E = v_BTHP.shape, q_BTHE.shape[3]
    document_BcQ = None if segments_BT is None else in_chunks(starts(segments_BT), Q).cumsum(2)
    sees_BcQQ, whole_BcQ, last_BcQ = masks(document_BcQ, Q, v_BTHP.device)
    log_decay_BcQY = in_chunks(log_decay_BTHX.float().clamp_min(LOWEST_LOG_DECAY).flatten(2), Q)
    sums_BcHQX = running_sums(log_decay_BcQY, document_BcQ).unflatten(-1, (H, -1)).transpose(2, 3)
    q_BcHQE, k_BcHQE, v_BcHQP = (in_chunks(t.float(), Q).transpose(2, 3) for t in (q_BTHE, k_BTHE, v_BTHP))
    beta_BcHQ1 = in_chunks(beta_BTH.float(), Q).transpose(2, 3)[..., None]

    score_BcHQQ, system_BcHQQ = pairs(q_BcHQE, k_BcHQE, sums_BcHQX, sees_BcQQ[:, :, None])
    from_start_BcHQX = sums_BcHQX.exp()
    to_end_BcHQX = decay(sums_BcHQX[..., -1:, :] - sums_BcHQX)
    if document_BcQ is not None:
        from_start_BcHQX = from_start_BcHQX * whole_BcQ[:, :, None, :, None]
        to_end_BcHQX = to_end_BcHQX * last_BcQ[:, :, None, :, None]
    # The corrections without a state before the chunk, and what of them each number of that state takes away.
    given_BcHQY = torch.cat((v_BcHQP, k_BcHQE * from_start_BcHQX), -1) * beta_BcHQ1
    solved_BcHQY = torch.linalg.solve_triangular(
        (system_BcHQQ * beta_BcHQ1).tril(-1), given_BcHQY, upper=False, unitriangular=True
    )
    alone_BcHQP, taken_BcHQE = solved_BcHQY.split([P, E], -1)
    reads_BcHQE, writes_BcHQE = q_BcHQE * from_start_BcHQX, k_BcHQE * to_end_BcHQX
    kept_BcHX1 = from_start_BcHQX[..., -1, :, None]

    state_BHEP = v_BcHQP.new_zeros(B, H, E, P) if state_BHEP is None else state_BHEP.float()
    ys = []
    for alone, taken, score, reads, writes, kept in zip(
        *(t.unbind(1) for t in (alone_BcHQP, taken_BcHQE, score_BcHQQ, reads_BcHQE, writes_BcHQE, kept_BcHX1))
    ):
        new_BHQP = alone - taken @ state_BHEP
        ys.append(reads @ state_BHEP + score @ new_BHQP)
        state_BHEP = kept * state_BHEP + writes.transpose(-1, -2) @ new_BHQP
    y_BTHP = torch.stack(ys, 1).transpose(2, 3).flatten(1, 2)[:, :T]
    return y_BTHP.to(v_BTHP.dtype), state_BHEP
