"""Experts that get equally many tokens: what layers with experts tell in a training step, and losses that even them.

The load-balancing loss of a row is E * sum over experts of (its share of the row's choices) * (the mean of its scores):
1 where all are alike, E where one expert has everything (Switch Transformers, arXiv:2101.03961, eq. 4 to 6; by rows, as
in DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20). The z-loss of a row is the mean of its tokens' squared log of the sum
of exp(logits) (ST-MoE, arXiv:2202.08906, eq. 5). Both are of a row alone, so that a step's are the same however its
rows are shared by ranks and microbatches. Padding does not count.

Letters: B rows, T time, N = B * T, E experts, K choices of a token, C what it can choose (E, or one more).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.module import KindModule
from mambadsl.kinds.tokens import PADDING, Tokens

#: What stands in `told` after the experts' loads: rows, and sums over them of the losses.
FIGURES = ("rows", "aux", "z")


class Balanced(KindModule):
    """A layer with `experts`, and the fields `aux_loss`, `z_loss` and `bias_rate`.

    told: float32 [E + FIGURES], zeros; a backward pass adds loads and figures to its gradient. None: nobody asks.
    (A backward pass is done once, whatever of the forward pass is done again, and autograd adds up microbatches.)
    row_share: what a row's losses count for in the step's.
    """

    told: Tensor | None = None
    row_share: float = 0.0

    def watch(self, *, row_share: float, device: torch.device) -> None:
        self.told = torch.zeros(self.f.experts + len(FIGURES), device=device, requires_grad=True)
        self.row_share = row_share

    @property
    def bias(self) -> Tensor | None:
        """What is added to the experts' scores for choosing only, [C]."""
        return self.router.bias

    def telling(
        self, index_NK: Tensor, weight_NK: Tensor, *, counted_NK: Tensor | None, scores_NC: Tensor | None,
        logits_NC: Tensor | None, tokens: Tokens,
    ) -> Tensor:
        """The weights of the experts chosen, whose backward pass tells and has the losses' gradients.

        counted_NK: 0 where a choice is no expert; None if all are. scores_NC, logits_NC: of losses that there are."""
        rows = tokens.batch, tokens.length
        segments_BT = tokens.segments_BT
        real_BT = torch.ones(rows, device=index_NK.device) if segments_BT is None else (segments_BT != PADDING).float()
        counted_BTK = real_BT[..., None].expand(*rows, index_NK.shape[1])
        if counted_NK is not None:
            counted_BTK = counted_BTK * counted_NK.unflatten(0, rows)
        loads_BE = loads(index_NK.unflatten(0, rows), counted_BTK, experts=self.f.experts)
        aux = z = loads_BE.new_zeros(())
        if self.f.aux_loss:
            aux = aux_losses(scores_NC[:, : self.f.experts].unflatten(0, rows), loads_BE, real_BT).sum()
        if self.f.z_loss:
            z = z_losses(logits_NC.unflatten(0, rows), real_BT).sum()
        loss = self.row_share * (self.f.aux_loss * aux + self.f.z_loss * z)
        figures = torch.stack((loads_BE.new_full((), rows[0]), aux.detach(), z.detach()))
        told = (self.told * torch.cat((loads_BE.sum(0), figures))).sum()
        return WithLoss.apply(weight_NK, loss + told)


def loads(index_BTK: Tensor, counted_BTK: Tensor, *, experts: int) -> Tensor:
    """How many of a row's choices each expert has, float32 [B, E]."""
    none_BE = counted_BTK.new_zeros(index_BTK.shape[0], experts)
    return none_BE.scatter_add(1, index_BTK.flatten(1), counted_BTK.flatten(1))


def aux_losses(scores_BTE: Tensor, loads_BE: Tensor, real_BT: Tensor) -> Tensor:
    """The load-balancing loss of each row, [B]; scores of a token sum to 1."""
    share_BE = loads_BE / loads_BE.sum(1, keepdim=True).clamp_min(1)
    mean_BE = (scores_BTE * real_BT[..., None]).sum(1) / real_BT.sum(1, keepdim=True).clamp_min(1)
    return loads_BE.shape[1] * (share_BE * mean_BE).sum(1)


def z_losses(logits_BTC: Tensor, real_BT: Tensor) -> Tensor:
    """The z-loss of each row, [B]."""
    return (logits_BTC.logsumexp(-1).square() * real_BT).sum(1) / real_BT.sum(1).clamp_min(1)


def bias_step(loads_E: Tensor, *, rate: float) -> Tensor:
    """What is added to the bias after a step in which the experts had these loads, whole numbers: `rate` for those with
    less than the mean, -rate for those with more (DeepSeek-V3, section 2.1.2)."""
    # load < mean where E * load < the sum: exact.
    return rate * torch.sign(loads_E.sum() - len(loads_E) * loads_E)


class WithLoss(torch.autograd.Function):
    """x, whose backward pass begins that of a loss too: no layer, stage or recomputed part has to hand the loss on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
