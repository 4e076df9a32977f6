"""Layers through torch.compile: each whole, for its very shapes; layers alike share one compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from mambadsl.build.model import Model

#: Versions that torch.compile may make beside one for each layer: with segments and without, training and not.
VERSIONS = 8


def compiled(model: Model, *, backend: Any = "inductor") -> dict[nn.Module, Callable]:
    """The forward of every layer as torch.compile runs it; the model stays as it is."""
    layers = {id(sublayer): sublayer for _, sublayer in model.sublayers()}.values()
    return {one: torch.compile(one.forward, backend=backend, fullgraph=True, dynamic=False) for one in layers}


def limits(layers: int) -> dict[str, int]:
    """What torch._dynamo's configuration must have while so many layers run, or it gives up on some."""
    config = torch._dynamo.config
    limit = max(config.recompile_limit, layers + VERSIONS)
    return {
        "recompile_limit": limit, "accumulated_recompile_limit": max(config.accumulated_recompile_limit, 2 * limit)
    }
