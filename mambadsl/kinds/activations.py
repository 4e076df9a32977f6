"""Activations of feed-forward layers: the words of `mlp.kind.ACT` and what they compute. Torch.

Letters: F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor


def relu2(x: Tensor) -> Tensor:
    """relu(x) ** 2 (arXiv:2109.08668)."""
    return F.relu(x).square()


#: gelu is the exact form, gelu_tanh its tanh approximation.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
    "relu": F.relu,
}


def activate(h: Tensor, *, act: str, gated: bool, gate_multiplier: float = 1) -> Tensor:
    """Hidden values before the second projection, [..., F].

    h: [..., F], or [..., 2F] = [gate | up] where gated; then act(gate * gate_multiplier) * up.
    """
    function = ACTIVATIONS[act]
    if not gated:
        return function(h)
    gate, up = h.chunk(2, -1)
    return function(gate if gate_multiplier == 1 else gate * gate_multiplier) * up
