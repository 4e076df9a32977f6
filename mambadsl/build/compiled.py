"""Layers through torch.compile: each whole, for its very shapes; layers alike share one compilation. A part that waits
for the device (`waits`) cannot be traced: its layer is compiled around it.
"""

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
    """The forward of every layer as torch.compile runs it; without that, the model computes as it did."""
    found = {}
    for sublayer in {id(sublayer): sublayer for _, sublayer in model.sublayers()}.values():
        whole = True
        for mixer in sublayer.mixer_modules():
            for slot in mixer.waiting:
                mixer.parts[slot], whole = torch.compiler.disable(mixer.parts[slot]), False
        found[sublayer] = torch.compile(sublayer.forward, backend=backend, fullgraph=whole, dynamic=False)
    return found


def limits(layers: int) -> dict[str, int]:
    """What torch._dynamo's configuration must have while so many layers run, or it gives up on some."""
    config = torch._dynamo.config
    limit = max(config.recompile_limit, layers + VERSIONS)
    return {
        "recompile_limit": limit, "accumulated_recompile_limit": max(config.accumulated_recompile_limit, 2 * limit)
    }
