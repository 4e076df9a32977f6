"""Logits, and cross entropy of the next token and of those after it: what counts, and the mean over it.

Letters: B batch, T time, D d_model, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.build.residual import scaled

#: The target where nothing is predicted. Any negative number does the same.
IGNORE = -100


def logits_of(h_TD: Tensor, weight_VD: Tensor, *, multiplier: float = 1.0, softcap: float | None = None) -> Tensor:
    """What the head gives for what it reads, [..., V], float32; the multiplier and the soft cap come after the
    widening."""
    logits_TV = scaled(F.linear(h_TD, weight_VD).float(), multiplier)
    return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


def next_tokens(tokens_BT: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Each token's successor, int64 [B, T]; IGNORE where it is padding, of another document, or not there."""
    targets_BT = torch.full_like(tokens_BT, IGNORE, dtype=torch.int64)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    if segments is not None:
        targets_BT[:, :-1].masked_fill_(segments[:, 1:] != segments[:, :-1], IGNORE)
    if valid is not None:
        targets_BT[:, :-1].masked_fill_(~valid[:, 1:].bool(), IGNORE)
    return targets_BT


def counted(
    targets_BT: Tensor, *, like: Tensor, segments: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Targets as int64, IGNORE where they are negative or padding. ValueError for another shape than the tokens'."""
    wanted, given = list(like.shape[:2]), list(targets_BT.shape)
    if wanted != given:
        raise ValueError(f"targets must be {wanted} like the tokens, not {given}")
    targets_BT = targets_BT.long()
    if segments is not None:
        targets_BT = targets_BT.masked_fill(segments < 0, IGNORE)
    if valid is not None:
        targets_BT = targets_BT.masked_fill(~valid.bool(), IGNORE)
    return targets_BT.masked_fill(targets_BT < 0, IGNORE)


def cross_entropy(
    logits_BTV: Tensor, targets_BT: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Mean over the tokens that count (target not negative, not padding), float32; 0 if there are none.
    ValueError for targets of another shape or outside the vocabulary (on a CPU; elsewhere torch says so)."""
    targets_BT = counted(targets_BT, like=logits_BTV, segments=segments, valid=valid)
    try:
        total = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
    except IndexError:
        vocab = logits_BTV.shape[-1]
        found = f"there is {targets_BT.max().item()}"
        raise ValueError(f"targets must be less than {vocab} (vocab = {vocab}); {found}") from None
    return total / (targets_BT != IGNORE).sum().clamp_min(1)


def objective(
    logits: Sequence[Tensor], targets_BT: Tensor, *, loss_weight: float, segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """What a model with an `mtp` tail is trained on, from the logits [B, T, V] that `Model.drafts` gives: cross entropy
    of the targets, and of the later ones that each depth predicts."""
    padding = dict(segments=segments, valid=valid)
    targets = later(targets_BT, depths=len(logits) - 1, **padding)
    losses = [cross_entropy(one, what, **padding) for one, what in zip(logits, targets)]
    return weighted(losses, loss_weight=loss_weight)


def later(
    targets_BT: Tensor, *, depths: int, segments: Tensor | None = None, valid: Tensor | None = None
) -> list[Tensor]:
    """The targets, and for each depth those one token further on in the same document."""
    found = [targets_BT]
    for _ in range(depths):
        found.append(next_tokens(found[-1], segments=segments, valid=valid))
    return found


def counts(
    targets_BT: Tensor, *, depths: int, segments: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """How many targets count, of the head and of each depth of `mtp`: int64 [1 + depths]."""
    padding = dict(segments=segments, valid=valid)
    targets = later(counted(targets_BT, like=targets_BT, **padding), depths=depths, **padding)
    return torch.stack([(what != IGNORE).sum() for what in targets])


def weighted(losses: Sequence[Tensor], *, loss_weight: float) -> Tensor:
    """The first loss, and `loss_weight` times the mean of the others."""
    first, *others = losses
    return first + loss_weight * torch.stack(others).mean() if others else first
