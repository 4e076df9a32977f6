"""AdamW over a rank's weights, by the decay groups that kinds declare; its state by path, to save and to load.

The learning rate is set from the step alone (`schedule.py`), so nothing of it needs to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mambadsl.train.pieces import Piece
from mambadsl.train.schedule import rate
from mambadsl.train.settings import Settings

#: What AdamW keeps of each weight, float32 and of its shape.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """step: done so far. The state is there from the start, so that loading has where to write."""

    def __init__(self, pieces: list[Piece], settings: Settings, *, fused: bool):
        self.settings = settings
        self.named = [
            (path, p, made.model.weights[path].decay) for made in pieces for path, p in made.model.named_parameters()
        ]
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for _, p, decays in self.named:
            # torch's fused loops take weights cut over the data ranks and whole ones, but not in one group.
            groups.setdefault((decays, isinstance(p, DTensor)), []).append(p)
        self.adam = torch.optim.AdamW(
            [
                dict(params=params, weight_decay=settings.weight_decay if decays else 0.0)
                for (decays, _), params in groups.items()
            ],
            lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused, foreach=not fused,
        )
        for _, p, _ in self.named:
            step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            self.adam.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in MOMENTS}}

    def step(self, step: int) -> float:
        """One update, the `step`-th counted from 0; gives the learning rate."""
        s = self.settings
        lr = rate(
            step, steps=s.steps, lr=s.lr, warmup=s.warmup, schedule=s.schedule, decay=s.decay, floor=s.floor
        )
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        return lr

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(path, moment, the rank's tensor) of each weight, copies of one weight one after another."""
        for path, p, _ in self.named:
            for name in MOMENTS:
                yield path, name, self.adam.state[p][name]

    def resume(self, step: int) -> None:
        """As after so many steps; the moments are written in place before."""
        for state in self.adam.state.values():
            state["step"].fill_(step)
