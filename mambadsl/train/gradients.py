"""Gradients between the backward passes and the optimizer: added up where a weight lives twice, measured, clipped.

A weight lives twice where two stages have it (a tied table, a shared block), and on every data rank where it is kept
whole (declared float32, of layers that compute in less). Where tensor ranks share a layer, those that have the same
elements of a weight have a part of their gradients each; of weights around such layers, all have the whole. Copies
begin equal and get equal gradients, so they stay equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mambadsl.train.held import Box, boxes, local
from mambadsl.train.pieces import Piece
from mambadsl.train.slices import Slice
from mambadsl.train.world import World


class Gradients:
    """Of a rank's pieces.

    parameters: path -> the rank's copies. groups: of ranks of the pipeline that share weights, and those paths.
    """

    def __init__(self, pieces: Sequence[Piece], world: World):
        self.world = world
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self.slices: dict[str, Slice] = {}
        for made in pieces:
            self.slices.update(made.slices)
            for path, p in made.model.named_parameters():
                self.parameters.setdefault(path, []).append(p)
        self.owned, self.groups = self._sharing()

    def _sharing(self) -> tuple[set[str], list[tuple[dist.ProcessGroup, list[str]]]]:
        """The paths whose norm this rank counts, and the groups that add up."""
        world = self.world
        everyone: list = [None] * world.ranks("pipeline")
        dist.all_gather_object(everyone, list(self.parameters), group=world.group("pipeline"))
        holders: dict[str, list[int]] = {}
        for at, paths in enumerate(everyone):
            for path in paths:
                holders.setdefault(path, []).append(at)
        owned = {path for path in self.parameters if holders[path][0] == world.at("pipeline")}
        shared: dict[tuple[int, ...], list[str]] = {}
        for path, at in holders.items():
            if len(at) > 1:
                shared.setdefault(tuple(at), []).append(path)
        return owned, list(self._groups(shared))

    def _groups(self, shared: dict[tuple[int, ...], list[str]]) -> Iterator[tuple[dist.ProcessGroup, list[str]]]:
        """Every rank of the world makes every group, in the same order, and keeps its own."""
        mesh = self.world.mesh.mesh
        for at, paths in sorted(shared.items()):
            for column in mesh[list(at)].flatten(1).T.tolist():
                group = dist.new_group(column)
                if self.world.rank in column:
                    yield group, sorted(paths)

    def add_up(self) -> None:
        """Copies of a weight get the sum of their gradients."""
        self._add_up_parts()
        for copies in self.parameters.values():
            if len(copies) > 1:
                total = sum(map(_given, copies))
                for p in copies:
                    local(p.grad).copy_(total)
        for group, paths in self.groups:
            for path in paths:
                first, *others = map(_given, self.parameters[path])
                dist.all_reduce(first, group=group)
                for other in others:
                    other.copy_(first)
        if self.world.ranks("data") > 1:
            every = [p for copies in self.parameters.values() for p in copies]
            # A tail that the loss does not count has none.
            if whole := [p.grad for p in every if p.grad is not None and not isinstance(p, DTensor)]:
                flat = torch.cat([grad.flatten() for grad in whole])
                dist.all_reduce(flat, group=self.world.group("data"))
                for grad, part in zip(whole, flat.split([grad.numel() for grad in whole])):
                    grad.copy_(part.view_as(grad))

    def _add_up_parts(self) -> None:
        """Of elements that several tensor ranks have. One sum for all: what a rank shares with its neighbours alone has
        a place of its own in it."""
        ranks, at = self.world.ranks("tensor"), self.world.at("tensor")
        several = [
            box for path in self.slices for p in self.parameters.get(path, ()) if p.grad is not None
            for box in boxes(p.grad, self.slices[path]) if box.copies > 1
        ]
        if not several:
            return
        flat = torch.cat([_placed(box, places=ranks // box.copies, at=at // box.copies) for box in several])
        dist.all_reduce(flat, group=self.world.group("tensor"))
        sums = flat.split([ranks // box.copies * box.view.numel() for box in several])
        for box, total in zip(several, sums):
            box.view.copy_(total.view(ranks // box.copies, *box.view.shape)[at // box.copies])

    def norm(self) -> Tensor:
        """Of all weights' gradients, each counted once; a float32 scalar, the same on every rank."""
        world, cut, whole = self.world, defaultdict(list), defaultdict(list)
        for path in sorted(self.owned):
            p = self.parameters[path][0]
            if p.grad is not None:
                for box in boxes(p.grad, self.slices.get(path), copies=world.ranks("tensor")):
                    (cut if isinstance(p, DTensor) else whole)[box.copies].append(box.view)
        total = self._squares(cut)
        if world.ranks("data") > 1:
            dist.all_reduce(total, group=world.group("data"))
        total = total + self._squares(whole)
        for axis in ("tensor", "pipeline"):
            if world.ranks(axis) > 1:
                dist.all_reduce(total, group=world.group(axis))
        return total.sqrt().float()

    def _squares(self, grads: dict[int, list[Tensor]]) -> Tensor:
        """copies -> gradients that so many tensor ranks have."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for copies, views in grads.items():
            total += torch.stack(torch._foreach_norm(views)).double().square().sum() / copies
        return total

    def clip(self, norm: Tensor, limit: float | None) -> None:
        """Scales every gradient so that their norm is at most `limit`."""
        if limit is None:
            return
        grads = [local(p.grad) for copies in self.parameters.values() for p in copies if p.grad is not None]
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))

    def clear(self) -> None:
        for copies in self.parameters.values():
            for p in copies:
                p.grad = None


def _given(p: nn.Parameter) -> Tensor:
    """This rank's rows of the gradient of a weight that lives twice; zeros where this one is used only by what the loss
    does not count."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return local(p.grad)


def _placed(box: Box, *, places: int, at: int) -> Tensor:
    """The box's elements in their place of several, zeros in the others."""
    if places == 1:
        return box.view.flatten()
    flat = box.view.new_zeros(places, box.view.numel())
    flat[at] = box.view.flatten()
    return flat.flatten()
