"""Low-rank adapters: a projection's function -> the same with up(down(x)) added.

In: the functions of a mixer's slots, and the factors as `kinds.sublayer.adapter_weights` declares them. Out: the
functions to run. Projections without a slot have no adapter (`refuse` says so). Letters: I what a projection reads,
R rank, S its segments with factors of their own (1: the projection as a whole), E what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.kind import Kind, Weight


def adapted(
    functions: Mapping[str, Callable[..., Any]], kind: Kind, factors: tuple[Weight, ...], home: nn.Module
) -> dict[str, Callable[..., Any]]:
    """factors: `<path>.down.weight` [S * R, I] and `<path>.up.weight` [E, R] of each projection, in turn; modules below
    `home`."""
    found = dict(functions)
    for up in factors[1::2]:
        path = up.name.removesuffix(".up.weight")
        slot = kind.slot_of(path.removeprefix("adapter."))
        sizes = tuple(size for _, size in up.segments) or up.shape[:1]
        # A partial, not a closure: a copy of the model then has the copy's factors in it.
        found[slot] = partial(_project, functions[slot], home.get_submodule(path), sizes)
    return found


def _project(
    function: Callable[..., Tensor], factors: nn.Module, sizes: tuple[int, ...], x: Tensor, weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    low = F.linear(x, factors.down.weight)
    pairs = zip(low.chunk(len(sizes), -1), factors.up.weight.split(sizes))
    return function(x, weight, bias) + torch.cat([F.linear(low_R, up_ER) for low_R, up_ER in pairs], -1)
