"""Gradients between the backward passes and the optimizer: added up where a weight lives twice, measured, clipped.

A weight lives twice where two stages have it (a tied table, a shared block), and on every data rank where it is kept
whole (declared float32). Its copies begin equal and get equal gradients, so they stay equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mambadsl.train.pieces import Piece, local
from mambadsl.train.world import World


class Gradients:
    """Of a rank's pieces.

    parameters: path -> the rank's copies. groups: of ranks of the pipeline that share weights, and those paths.
    """

    def __init__(self, pieces: Sequence[Piece], world: World):
        self.world = world
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for made in pieces:
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
        for copies in self.parameters.values():
            if len(copies) > 1:
                total = sum(local(p.grad) for p in copies)
                for p in copies:
                    local(p.grad).copy_(total)
        for group, paths in self.groups:
            for path in paths:
                first, *others = (local(p.grad) for p in self.parameters[path])
                dist.all_reduce(first, group=group)
                for other in others:
                    other.copy_(first)
        if self.world.ranks("data") > 1:
            whole = [p.grad for copies in self.parameters.values() for p in copies if not isinstance(p, DTensor)]
            if whole:
                flat = torch.cat([grad.flatten() for grad in whole])
                dist.all_reduce(flat, group=self.world.group("data"))
                for grad, part in zip(whole, flat.split([grad.numel() for grad in whole])):
                    grad.copy_(part.view_as(grad))

    def norm(self) -> Tensor:
        """Of all weights' gradients, each counted once; a float32 scalar, the same on every rank."""
        cut, whole = [], []
        for path in self.owned:
            p = self.parameters[path][0]
            if p.grad is not None:
                (cut if isinstance(p, DTensor) else whole).append(local(p.grad))
        total = self._squares(cut)
        if self.world.ranks("data") > 1:
            dist.all_reduce(total, group=self.world.group("data"))
        total = total + self._squares(whole)
        if self.world.ranks("pipeline") > 1:
            dist.all_reduce(total, group=self.world.group("pipeline"))
        return total.sqrt().float()

    def _squares(self, grads: list[Tensor]) -> Tensor:
        if not grads:
            return torch.zeros((), dtype=torch.float64, device=self.world.device)
        return torch.stack(torch._foreach_norm(grads)).double().square().sum()

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

