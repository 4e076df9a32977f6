"""What residual forms of `kinds/residual.py` compute: the way from the stream into the branches, and back. Those with
several streams are in `streams.py`.

Letters: B batch, T time, D d_model, I width that the branches read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.module import Declared
from mambadsl.kinds.norm import Norm, rms_norm
from mambadsl.kinds.residual import AFFINE, form_of
from mambadsl.kinds.values import Values


class Add(Declared):
    """`pre`, `post`, `sandwich`: adds what the branches, or the norm behind them, give. The base of all forms: children
    are named as the form's weights are, below `residual`."""

    def __init__(
        self, sub: Values, d_model: int, *, streams: int = 1, dtype: torch.dtype, device: Any = None,
        rms: Callable[..., Tensor] = rms_norm,
    ):
        """sub: the sublayer's fields. streams: the most that a use of the layer reads. rms: what computes RMS norms."""
        super().__init__()
        self.form, self.d_model = sub.residual, d_model
        table = form_of(sub.residual).weights(sub, d_model, streams)
        self.declare(table, dtype=dtype, device=device, below="residual.")

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
        return scaled(h_BTI, self.form.alpha) + scaled(y_BTD.to(x_BTD.dtype), self.form.beta)


class Affine(Add):
    def __init__(self, sub: Values, d_model: int, *, streams: int = 1, **made: Any):
        super().__init__(sub, d_model, streams=streams, **made)
        self.out_affine, self.stream_affine = Norm(AFFINE, d_model, **made), Norm(AFFINE, d_model, **made)

    def write(self, x_BTD: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        return self.out_affine(y_BTD, dtype=x_BTD.dtype) + self.stream_affine(x_BTD)


class Aside(Add):
    def read(self, x_BTD: Tensor, t_BTD: Tensor | None) -> tuple[Tensor, Any]:
        return (x_BTD if t_BTD is None else t_BTD), None

    def write(self, x_BTD: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        return y_BTD.to(x_BTD.dtype)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor, and x itself for 1 (most layers: no copy)."""
    return x if factor == 1 else x * factor
