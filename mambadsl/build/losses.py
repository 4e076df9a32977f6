"""What a model is trained on: the loss of the next token, and of those after it that an `mtp` tail predicts.

Letters: B batch, T time, D d_model, K losses: the head's, and one of each depth.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mambadsl.build.failure import located
from mambadsl.build.loss import IGNORE, counted, cross_entropy, later, next_tokens, weighted


class Losses:
    """Of a whole model, or of a pipeline's last stage."""

    def loss(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, segments: Tensor | None = None,
        valid: Tensor | None = None, positions: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy of the tokens that count, a float32 scalar, for a whole model; with an `mtp` tail, and
        `loss_weight` times the mean of its depths' losses.

        targets_BT: the id to predict at each token, negative where nothing counts; default: each token's
        successor in its own document. The keywords are as in `forward`.
        """
        if self.stage.count > 1:
            last = "give the last stage's logits to `mambadsl.build.loss`: `cross_entropy`, or `objective` with `mtp`"
            raise ValueError(f"the loss is of a whole model; of a pipeline, {last}")
        what = dict(segments=segments, valid=valid, positions=positions)
        losses = self._losses((tokens_BT,), targets_BT, depths=self.trained_depths, **what)
        return weighted([loss for loss, _ in losses], loss_weight=self.loss_weight)

    def share(
        self, *inputs: Tensor, targets_BT: Tensor, counts_K: Tensor, segments: Tensor | None = None,
        valid: Tensor | None = None, positions: Tensor | None = None,
    ) -> Tensor:
        """What these rows add to the loss of more rows than there are here, a float32 scalar; of a whole model, or of a
        pipeline's last stage, whose inputs they then are.

        counts_K: of all the rows, from `loss.counts` (the head's, and one for each trained depth of `mtp`). The shares
        of the parts of a batch add up to the batch's `loss`, however it is cut.
        """
        if self.stage.gives != ("logits",):
            raise ValueError("a share of the loss comes from a whole model, or from a pipeline's last stage")
        padding = dict(segments=segments, valid=valid)
        losses = self._losses(inputs, targets_BT, depths=self.trained_depths, positions=positions, **padding)
        shares = []
        for (loss, what), count in zip(losses, counts_K):
            here = (counted(what, like=what, **padding) != IGNORE).sum()
            shares.append(loss * (here / count.clamp_min(1)))
        return weighted(shares, loss_weight=self.loss_weight)

    def losses(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, segments: Tensor | None = None,
        valid: Tensor | None = None, positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Mean cross entropy of the next token, and of the token that each depth of `mtp` predicts: 1 + depths scalars.
        Arguments as in `loss`."""
        what = dict(segments=segments, valid=valid, positions=positions)
        return tuple(loss for loss, _ in self._losses((tokens_BT,), targets_BT, depths=self.depths, **what))

    def _losses(
        self, inputs: tuple[Tensor, ...], targets_BT: Tensor | None, *, depths: int, positions: Tensor | None,
        **padding: Tensor | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The loss of the head and of each depth, with its targets."""
        if targets_BT is None:
            targets_BT = next_tokens(inputs[0], **padding)
        hidden = self._ahead(inputs, positions=positions, **padding)
        # The targets first: where they end, no further depth is run.
        for what, h_BTD in zip(later(targets_BT, depths=depths, **padding), hidden):
            yield self._loss(h_BTD, what, **padding), what

    def _loss(self, h_BTD: Tensor, targets_BT: Tensor, **padding: Tensor | None) -> Tensor:
        if "loss" not in self.frame:
            return cross_entropy(self.logits(h_BTD), targets_BT, **padding)
        model = self.graph.model
        with located(self.stage.body[-1]):
            return self.frame["loss"](
                h_BTD, self._head_weight(), counted(targets_BT, like=h_BTD, **padding),
                multiplier=model.logits_multiplier, softcap=model.logits_softcap,
            )
