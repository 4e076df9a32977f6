"""What each residual form of `kinds/residual.py` computes: the way from the stream into the branches, and back.

Letters: B batch, T time, D d_model, I width that the branches read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mambadsl.kinds.module import add_weights
from mambadsl.kinds.residual import form_of
from mambadsl.kinds.values import Variant


class Add(nn.Module):
    """`pre`, `post`, `sandwich`: adds what the branches, or the norm behind them, give. The base of all forms: children
    are named as the form's weights are, below `residual`."""

    def __init__(self, residual: Variant, d_model: int, *, dtype: torch.dtype, device: Any = None):
        super().__init__()
        self.residual = residual
        table = form_of(residual).weights(residual, d_model)
        add_weights(self, table, dtype=dtype, device=device, below="residual.")

    def read(self, x_BTD: Tensor, t_BTD: Tensor | None) -> tuple[Tensor, Any]:
        """What the norm before the branches reads, and what `write` is given of it. t_BTD: what the layer before gave
        aside of the stream."""
        return (x_BTD if t_BTD is None else x_BTD + t_BTD), None

    def write(self, x_BTD: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        """The stream behind the layer. x_BTD: before it; h_BTI: what the branches read; y_BTD: what they gave."""
        # The sum widens a narrower y by itself: as a copy, that would be read and written once more.
        wide = torch.promote_types(x_BTD.dtype, y_BTD.dtype) == x_BTD.dtype
        return x_BTD + (y_BTD if wide else y_BTD.to(x_BTD.dtype))


class Normed(Add):
    def write(self, x_BTD: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        return scaled(h_BTI, self.residual.alpha) + scaled(y_BTD.to(x_BTD.dtype), self.residual.beta)


class Aside(Add):
    def read(self, x_BTD: Tensor, t_BTD: Tensor | None) -> tuple[Tensor, Any]:
        return (x_BTD if t_BTD is None else t_BTD), None

    def write(self, x_BTD: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        return y_BTD.to(x_BTD.dtype)


#: Form -> its class.
WAYS: dict[str, type[Add]] = {"pre": Add, "post": Add, "sandwich": Add, "normed": Normed, "aside": Aside}


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor, and x itself for 1 (most layers: no copy)."""
    return x if factor == 1 else x * factor
