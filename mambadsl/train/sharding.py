"""FSDP2 over the data ranks: weights in float32, cut into rows, and gathered in what layers compute in.

A few layers are gathered together, so that what is sent is large. `gather`: "all" gathers a layer once a step and keeps
the copy to the end of its backward pass; "layers" gathers anew for each pass, and has two groups of layers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mambadsl.build.model import DTYPES
from mambadsl.train.settings import Settings
from mambadsl.train.world import World

#: Layers are gathered together up to so many weights, and so many layers.
ELEMENTS, LAYERS = 2**26, 4


def shard(made: nn.Module, world: World, settings: Settings) -> None:
    """Cuts a `Piece`; one data rank too where layers compute in less than float32."""
    narrow = DTYPES[settings.dtype]
    if world.ranks("data") == 1 and narrow == torch.float32:
        return
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    whole: set[nn.Parameter] = set()
    if narrow != torch.float32:
        policy = replace(policy, param_dtype=narrow, reduce_dtype=torch.float32)
        named = dict(made.model.named_parameters())
        whole = {p for path, p in named.items() if made.model.weights[path].fp32}
    how = dict(
        mesh=world.mesh["data"], mp_policy=policy, ignored_params=whole,
        reshard_after_forward=regathers(settings, data=world.ranks("data")),
    )
    alone = Counter(node.owner for node, _ in made.model.sublayers())
    # What several places use is gathered with the frame: only a layer's own call gathers it.
    layers = {
        node.owner: sublayer for node, sublayer in made.model.sublayers()
        if node.owner == node.path and alone[node.owner] == 1
    }
    sizes = {owner: sum(p.numel() for p in s.parameters() if p not in whole) for owner, s in layers.items()}
    groups = [fully_shard([layers[owner] for owner in group], **how)[0] for group in together(sizes)]
    fully_shard(made, **how)
    for one, after in zip(groups, groups[1:]):
        one.set_modules_to_forward_prefetch([after])
    for module in made.modules():
        if isinstance(module, FSDPModule):
            # Losses are shares of the step's already: gradients are added, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def regathers(settings: Settings, *, data: int) -> bool:
    """Whether a pass gathers what it needs and lets it go. Never in a pipeline: each microbatch would gather anew."""
    return data > 1 and settings.stages == 1 and settings.gather == "layers"


def together(sizes: Mapping[str, int]) -> list[list[str]]:
    """Neighbours that are gathered at once, of layers with so many weights each."""
    groups: list[list[str]] = []
    for owner, size in sizes.items():
        if not groups or len(groups[-1]) == LAYERS or sum(map(sizes.__getitem__, groups[-1])) + size > ELEMENTS:
            groups.append([])
        groups[-1].append(owner)
    return groups
