"""Projections by Transformer Engine: the slots `*.in_proj`, `*.up_proj` and the like, in bfloat16, float16 or FP8.

In: activations and the layer's own parameters. Out: x @ weight^T + bias, or the same of the normed x. Refuses
float32 (the kernels would round products to TF32) and, in FP8, token counts that are no multiple of 16.

A module of Transformer Engine without memory (on `meta`) stands behind each weight; every call lends it the
parameters, so gradients reach them and no name changes. torch.compile breaks its graph around the call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from mambadsl.kinds.norm import Norm
from mambadsl.parts.te.load import load

#: Our word -> the class in `transformer_engine.common.recipe`. Delayed scaling is not here: it keeps a history that
#: has to advance once a step for all layers together, and a part sees one call of one layer.
RECIPES = {"current": "Float8CurrentScaling", "block": "Float8BlockScaling"}
NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
#: FP8 products want every side to be a multiple of it; tokens are a side of the weights' gradient.
FP8_SIDE = 16


def make_linear(*, fp8: bool = False, recipe: str = "current") -> Callable[..., Tensor]:
    """A function for projections: (x [..., in], weight [out, in], bias [out] or None) -> [..., out], as F.linear.

    fp8: operands of the three products in FP8, with a scale for each tensor (recipe `current`) or block of 128
    channels (`block`), from what is in them at that moment.
    ImportError without Transformer Engine; the function raises ValueError for dtypes or sizes it does not take.
    """
    te, precision = load(), _precision(fp8, recipe)

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        return te.Linear(weight.shape[1], weight.shape[0], **_made(weight, bias))

    modules = _Modules(make)

    @torch.compiler.disable
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        _check(x, weight, fp8)
        with precision():
            return functional_call(modules.of(weight, bias), _lent(weight, bias), (x,))

    return linear


def make_norm_linear(*, fp8: bool = False, recipe: str = "current") -> Callable[..., Tensor]:
    """A function for projections with the norm before them: (x, weight, bias, *, norm) -> [..., out], equal to
    F.linear(norm(x), weight, bias); in FP8, the norm's kernel writes FP8.

    norm: the sublayer's `Norm`, an RMS or layer norm that has all its weights. A residual stream in another dtype than
    the weights (float32) is normed by `norm` itself, in its own precision, and then goes through the plain linear.
    Otherwise as `make_linear`.
    """
    te, precision, linear = load(), _precision(fp8, recipe), make_linear(fp8=fp8, recipe=recipe)

    def make(weight: Tensor, bias: Tensor | None, norm: Norm) -> nn.Module:
        form = norm.norm
        return te.LayerNormLinear(
            weight.shape[1], weight.shape[0], eps=float(form.eps), normalization=NORMS[form.name],
            zero_centered_gamma=form.name == "rmsnorm" and form.zero_centered, **_made(weight, bias),
        )

    modules = _Modules(make)

    @torch.compiler.disable
    def norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm) -> Tensor:
        if x.dtype != weight.dtype:
            return linear(norm(x, dtype=weight.dtype), weight, bias)
        _check(x, weight, fp8)
        lent = _lent(weight, bias, layer_norm_weight=norm.weight, layer_norm_bias=norm.bias)
        with precision():
            return functional_call(modules.of(weight, bias, norm), lent, (x,))

    return norm_linear


class _Modules:
    """One module for each weight, for what it remembers of the weight; gone when the weight is."""

    def __init__(self, make: Callable[..., nn.Module]):
        self._make = make
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, weight: Tensor, *more: Any) -> nn.Module:
        if weight not in self._of:
            self._of[weight] = self._make(weight, *more)
        return self._of[weight]


def _made(weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    return dict(bias=bias is not None, params_dtype=weight.dtype, device="meta", fuse_wgrad_accumulation=False)


def _lent(weight: Tensor, bias: Tensor | None, **more: Tensor | None) -> dict[str, Tensor]:
    named = dict(weight=weight, bias=bias, **more)
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _precision(fp8: bool, recipe: str) -> Callable[[], AbstractContextManager[Any]]:
    """The context of one call."""
    if not fp8:
        return nullcontext
    from transformer_engine.common import recipe as recipes

    te, chosen = load(), getattr(recipes, RECIPES[recipe])()
    return lambda: te.autocast(enabled=True, recipe=chosen)


def _check(x: Tensor, weight: Tensor, fp8: bool) -> None:
    if weight.dtype not in (torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        raise ValueError(f"Transformer Engine projects bfloat16 or float16, one dtype; got {x.dtype} @ {weight.dtype}")
    sides = dict(tokens=x.shape[:-1].numel(), input=weight.shape[1], output=weight.shape[0])
    uneven = [f"{name} {side}" for name, side in sides.items() if side % FP8_SIDE]
    if fp8 and uneven:
        raise ValueError(f"FP8 products need sides that are multiples of {FP8_SIDE}, not {' and '.join(uneven)}")
