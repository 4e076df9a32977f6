"""The vocabulary that tensor ranks share: each has some rows of the table and of the head's weight (arXiv:1909.08053,
section 3).

A rank looks up the ids that it has, and what the ranks give is added up. Logits are each rank's part of the vocabulary
and stay there: cross entropy needs of the others' the largest, the sum of exponentials and the target's own. It stands
in the slot `model.loss`, whatever the part set has there: no part has a loss over some of the logits.

torch's `loss_parallel` does the same for DTensors, while it is entered, the backward included; here that is the
pipeline's, and weights are DTensors of the data ranks alone.

Letters: B batch, T time, D d_model, R rows (B * T), V this rank's ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambadsl.build.loss import logits_of
from mambadsl.build.model import Model
from mambadsl.train.tensor import enter, leave

#: Float32 logits that are kept for the backward: where there would be more, they are made anew, so many at a time.
KEPT_BYTES = 2**31


def share(model: Model, *, vocab: int, group: dist.ProcessGroup) -> None:
    """Lets a model of one rank's part compute its ends with the other ranks', if it has a part of the vocabulary.
    vocab: ids that there are. Its `logits` are the rank's own."""
    size = model.graph.model.vocab
    if size == vocab:
        return
    part = Part(group, first=dist.get_rank(group) * size, size=size, vocab=vocab)
    model.look_up, model.vocab = part.look_up, vocab
    model.frame = {**model.frame, "loss": part.loss}


@dataclass(frozen=True)
class Part:
    """The ids from `first` on, `size` of `vocab`."""

    group: dist.ProcessGroup
    first: int
    size: int
    vocab: int

    def look_up(self, ids_BT: Tensor, weight_VD: Tensor) -> Tensor:
        """The ids' rows of the whole table, [B, T, D]. IndexError for an id that it does not have, as torch has it."""
        rows_BT, mine_BT = self.rows(ids_BT)
        known_BT = (ids_BT >= 0) & (ids_BT < self.vocab)
        x_BTD = F.embedding(torch.where(known_BT, rows_BT, ids_BT), weight_VD)
        return leave(x_BTD.masked_fill(~mine_BT[..., None], 0), self.group)

    def loss(
        self, h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, multiplier: float = 1.0,
        softcap: float | None = None,
    ) -> Tensor:
        """Mean cross entropy over the whole vocabulary of the tokens that count, a float32 scalar, 0 where none does;
        NaN where a target is no id."""

        def total(h_RD: Tensor, targets_R: Tensor) -> Tensor:
            logits_RV = logits_of(h_RD, weight_VD, multiplier=multiplier, softcap=softcap)
            return _CrossEntropy.apply(logits_RV, targets_R, self)

        h_RD, targets_R = enter(h_BTD, self.group).flatten(0, -2), targets_BT.flatten()
        rows = max(1, KEPT_BYTES // (4 * self.size))
        if len(h_RD) <= rows or not torch.is_grad_enabled():
            parts = [total(h, t) for h, t in zip(h_RD.split(rows), targets_R.split(rows))]
        else:
            how = dict(use_reentrant=False, preserve_rng_state=False)
            parts = [checkpoint(total, h, t, **how) for h, t in zip(h_RD.split(rows), targets_R.split(rows))]
        return torch.stack(parts).sum() / (targets_R >= 0).sum().clamp_min(1)

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's row of each id, 0 where another rank has it, and whether it is this one's."""
        rows = ids - self.first
        mine = (rows >= 0) & (rows < self.size)
        return torch.where(mine, rows, 0), mine

    def reduced(self, x: Tensor, how: str) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x, how, self.group))


class _CrossEntropy(torch.autograd.Function):
    """The sum over the rows that count, of the ranks' parts of the logits."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets_R: Tensor, part: Part) -> Tensor:
        aims_R, mine_R = part.rows(targets_R)
        top_R = part.reduced(logits_RV.amax(-1), "max")
        aim_R = torch.where(mine_R, logits_RV.gather(-1, aims_R[:, None])[:, 0] - top_R, 0)
        exps_RV = (logits_RV - top_R[:, None]).exp_()
        sum_R, aim_R = part.reduced(torch.stack((exps_RV.sum(-1), aim_R)), "sum")
        ctx.save_for_backward(exps_RV, sum_R, aims_R, mine_R, targets_R >= 0)
        losses_R = torch.where(targets_R < part.vocab, sum_R.log() - aim_R, torch.nan)
        return torch.where(targets_R >= 0, losses_R, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exps_RV, sum_R, aims_R, mine_R, counts_R = ctx.saved_tensors
        each_R = grad * counts_R
        grad_RV = exps_RV * (each_R / sum_R)[:, None]
        return grad_RV.scatter_add_(-1, aims_R[:, None], -(each_R * mine_R)[:, None]), None, None
