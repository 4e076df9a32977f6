"""What a benchmark compares: `Contender`, the numbers that rivals are built from, and the copying of weights.

In: a mambadsl Program and the weights of its model. Refuses (ValueError, KeyError) models that a rival cannot
express, and weights that do not cover each other exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: One letter for each kind, as in the patterns of Megatron and Nemotron-H.
LETTERS = {"mamba2": "M", "mlp": "-", "attention": "*"}


@dataclass(frozen=True)
class Shape:
    """The model in numbers. mamba2, mlp, attention: the fields of the layers of that kind (alike), or None."""

    vocab: int
    d_model: int
    tied: bool
    eps: float
    pattern: str
    mamba2: Any = None
    mlp: Any = None
    attention: Any = None

    @classmethod
    def of(cls, program: Any) -> Shape:
        graph = program.layers
        branches = [node.layer.branches[0] for node in graph.layers]
        fields: dict[str, Any] = {}
        for branch in branches:
            if fields.setdefault(branch.kind, branch.fields) != branch.fields:
                raise ValueError(f"rivals have one form of `{branch.kind}` layer in a model")
        model = graph.model
        pattern = "".join(LETTERS[branch.kind] for branch in branches)
        return cls(model.vocab, model.d_model, graph.tied, model.norm.eps, pattern, **fields)


@dataclass
class Contender:
    """run: tokens -> the loss, with fresh gradients in the parameters' `grad`. embedding: the parameter whose
    gradient is compared: all layers have had a say in it. first_step_is_largest: memory shows in the first
    step only (later ones replay a graph, which the allocator does not see)."""

    name: str
    run: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    embedding: Tensor
    ours: bool = False
    first_step_is_largest: bool = False
    close: Callable[[], None] = lambda: None


def rival(name: str, module: nn.Module, loss: Callable[[Tensor], Tensor], embedding: Tensor) -> Contender:
    """A module as its users train it: gradients None, forward, backward."""
    parameters = list(module.parameters())

    def run(tokens_BT: Tensor) -> Tensor:
        for p in parameters:
            p.grad = None
        found = loss(tokens_BT)
        found.backward()
        return found.detach()

    return Contender(name, run, parameters, embedding)


@dataclass(frozen=True)
class Source:
    """Our weight that fills one of theirs; `cut` where theirs is a part or an order of it."""

    name: str
    cut: Callable[[Tensor], Tensor] = lambda t: t


def copy_weights(
    theirs: nn.Module, ours: Mapping[str, Tensor], names: Mapping[str, str | Source], *, first_layer: int = 0
) -> None:
    """Fills every parameter of theirs. names: their name -> ours, `{i}` for the number of the layer. first_layer: the
    number of ours that their layer 0 is."""
    used = set()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            layer = re.search(r"\.(\d+)\.", name)
            i = layer[1] if layer else ""
            key = name.replace(f".{i}.", ".{i}.", 1) if layer else name
            if key not in names:
                raise KeyError(f"nothing of ours is named for `{name}` {list(parameter.shape)}")
            source = names[key] if isinstance(names[key], Source) else Source(names[key])
            path = source.name.replace("{i}", str(int(i) + first_layer) if i else "")
            value = source.cut(ours[path])
            if value.numel() != parameter.numel():
                raise ValueError(f"`{path}` {list(value.shape)} does not fill `{name}` {list(parameter.shape)}")
            parameter.copy_(value.reshape(parameter.shape))
            used.add(path)
    if left := sorted(set(ours) - used):
        raise KeyError(f"they have no place for {', '.join(left[:4])}")


def mamba_kernels() -> None:
    """Loads mamba_ssm's kernels as mambadsl does, so that a broken corner of the package stops nobody."""
    import importlib

    from mambadsl.parts.mamba_ssm.load import triton_kernels

    triton_kernels()
    importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
