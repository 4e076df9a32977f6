"""Norms over the last axis, computed in float32 whatever the dtype of x. Torch.

`Norm` is built from a form of `sublayer.EMBEDDING_NORM`; `rms_norm` and `layer_norm` are the functions.
Letters: D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.kind import norm_weights
from mambadsl.kinds.module import add_weights
from mambadsl.kinds.values import Variant


def rms_norm(
    x: Tensor, weight_D: Tensor | None, *, eps: float, zero_centered: bool = False, dtype: torch.dtype | None = None,
    averaged: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight, in `dtype` (None: that of x); the scale is 1 + weight where zero_centered.
    averaged: where x is a piece of what is normed, makes the mean of all pieces from that of this one, [..., 1].

    Scaled before it is rounded, as in Nemotron-H, OLMo and Gemma (Llama and Mamba round first: bf16
    results differ by one rounding).
    """
    scale = None if weight_D is None else weight_D.float() + 1 if zero_centered else weight_D.float()
    if averaged is None:
        return F.rms_norm(x.float(), x.shape[-1:], scale, eps).to(dtype or x.dtype)
    wide = x.float()
    unit = wide * torch.rsqrt(averaged(wide.square().mean(-1, keepdim=True)) + eps)
    return (unit if scale is None else unit * scale).to(dtype or x.dtype)


def layer_norm(
    x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, *, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in `dtype` (None: that of x)."""
    weight_D, bias_D = (None if t is None else t.float() for t in (weight_D, bias_D))
    return F.layer_norm(x.float(), x.shape[-1:], weight_D, bias_D, eps).to(dtype or x.dtype)


class Norm(nn.Module):
    """A norm form over `width` channels: [..., width] -> [..., width], in `dtype` or in the dtype it has. `none`
    changes nothing, `affine` shifts and scales: (x + bias) * weight.

    Parameters `weight` and `bias` [width], those that `norm_weights` declares. rms: what computes RMS norms, with the
    signature of `rms_norm`. groups: so many equal parts of the channels are normed each by itself.
    """

    def __init__(
        self, norm: Variant, width: int, *, dtype: torch.dtype = torch.float32, device: Any = None,
        rms: Callable[..., Tensor] = rms_norm, groups: int = 1,
    ):
        super().__init__()
        if norm.name not in ("rmsnorm", "layernorm", "affine", "none"):
            raise ValueError(f"no norm `{norm.name}`")
        self.norm, self.width, self.rms, self.groups = norm, width, rms, groups
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        table = norm_weights("norm", norm, width)
        named = tuple(replace(w, name=w.name.removeprefix("norm.")) for w in table)
        add_weights(self, named, dtype=dtype, device=device)

    def forward(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        if self.groups > 1:
            parts = x.chunk(self.groups, -1), self._chunks(self.weight), self._chunks(self.bias)
            return torch.cat([self._normed(*part, dtype) for part in zip(*parts)], -1)
        return self._normed(x, self.weight, self.bias, dtype)

    def _chunks(self, weight_D: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * self.groups if weight_D is None else weight_D.chunk(self.groups)

    def _normed(
        self, x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        match self.norm.name:
            case "none":
                return x if dtype is None else x.to(dtype)
            case "affine":
                return ((x.float() + self.bias.float()) * self.weight.float()).to(dtype or x.dtype)
            case "rmsnorm":
                zero_centered = self.norm.zero_centered
                return self.rms(x, weight_D, eps=self.norm.eps, zero_centered=zero_centered, dtype=dtype)
        return layer_norm(x, weight_D, bias_D, eps=self.norm.eps, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.norm}, width={self.width}"
