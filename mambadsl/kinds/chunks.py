"""What scans that work chunk by chunk share: documents inside chunks, and sums of log decays. Torch.

Letters: B batch, c chunks, Q tokens of a chunk, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: exp(-128) is 0 in float32; more decay than that would only cost the chunk's sums their precision.
LOWEST_LOG_DECAY = -128.0
#: Torch is fastest here (CPU, 64 channels a head, 128 numbers a channel: 3 times as fast as 256); kernels take the
#: layer's own.
LONGEST_CHUNK = 64


def in_chunks(t_BT: Tensor, Q: int) -> Tensor:
    """[B, T, ...] -> [B, c, Q, ...], zeros after the last token."""
    missing = -t_BT.shape[1] % Q
    t_BT = F.pad(t_BT, (0, 0) * (t_BT.dim() - 2) + (0, missing)) if missing else t_BT
    return t_BT.unflatten(1, (-1, Q))


def masks(
    document_BcQ: Tensor | None, Q: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Masks of ones and zeros for each chunk: which tokens up to itself a token sees [B or 1, c or 1, Q, Q];
    which are of the document that the chunk begins in; of the one that it ends in [B, c, Q] (None: all)."""
    causal_QQ = torch.ones(Q, Q, device=device).tril()
    if document_BcQ is None:
        return causal_QQ[None, None], None, None
    sees_BcQQ = causal_QQ * (document_BcQ[..., :, None] == document_BcQ[..., None, :])
    return sees_BcQQ, (document_BcQ == 0).float(), (document_BcQ == document_BcQ[..., -1:]).float()


def running_sums(a_BcQH: Tensor, document_BcQ: Tensor | None) -> Tensor:
    """Sums of each document's tokens of a chunk up to each token: by doubling spans, where a cumsum would
    let other documents into the rounding."""
    if document_BcQ is None:
        return a_BcQH.cumsum(2)
    span = 1
    while span < a_BcQH.shape[2]:
        same_BcQ = document_BcQ[..., span:] == document_BcQ[..., :-span]
        a_BcQH = a_BcQH + F.pad(a_BcQH[:, :, :-span] * same_BcQ[..., None], (0, 0, span, 0))
        span *= 2
    return a_BcQH


def decay(log_decay: Tensor) -> Tensor:
    """exp of a difference of running sums. Between tokens that see each other it is at most 0, but for rounding, which
    a gradient passes; between others it may be anything, counts 0, and must not overflow."""
    return log_decay.clamp_max(1).exp()
