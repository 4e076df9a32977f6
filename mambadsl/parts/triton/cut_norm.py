"""The gate and the grouped RMS norm of rows whose groups have channels on other ranks too, in Triton.

In: as the slots `gate_norm` have them, with `averaged`; out: their result, with its gradients. Each way there are two
passes, with a mean over the ranks between them: of squares forwards, of gradients times what is normed backwards.
Refuses (ValueError): as `gate_norm_kernels.py`.

Letters: R rows, I channels of this rank, G groups that it has channels of.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambadsl.parts.triton.gate_norm_kernels import gate_norm_backward, gate_norm_forward


class CutNorm(torch.autograd.Function):
    """(y_RI, z_RI, weight_I, averaged, order, groups, eps, gate) -> out_RI. averaged: [R, G] -> the mean over those who
    share a group, the same for all of them, so that gradients go through it as values do."""

    @staticmethod
    def forward(
        ctx: Any, y_RI: Tensor, z_RI: Tensor, weight_I: Tensor, averaged: Callable[[Tensor], Tensor], *how: Any
    ) -> Tensor:
        order, groups, eps, gate = how
        ctx.averaged, ctx.how = averaged, (order, groups, gate)
        rstd_RG = torch.rsqrt(averaged(_squares(y_RI, z_RI, *ctx.how)) + eps)
        ctx.save_for_backward(y_RI, z_RI, weight_I, rstd_RG)
        return _normed(y_RI, z_RI, weight_I, rstd_RG, *ctx.how)

    @staticmethod
    def backward(ctx: Any, dout_RI: Tensor) -> tuple[Tensor | None, ...]:
        saved, dout_RI = ctx.saved_tensors, dout_RI.contiguous()
        means_RG = ctx.averaged(_products(dout_RI, *saved, *ctx.how))
        return *_gradients(dout_RI, *saved, means_RG, *ctx.how), None, None, None, None, None


@torch.library.custom_op("mambadsl::cut_norm_squares", mutates_args=())
def _squares(y_RI: Tensor, z_RI: Tensor, order: str, groups: int, gate: str) -> Tensor:
    """Their means over this rank's channels, [R, G] float32."""
    how = dict(order=order, groups=groups, gate=gate, eps=0.0)
    return gate_norm_forward(y_RI, z_RI, None, out=y_RI, part="means", **how)[1]


@torch.library.custom_op("mambadsl::cut_norm", mutates_args=())
def _normed(
    y_RI: Tensor, z_RI: Tensor, weight_I: Tensor, rstd_RG: Tensor, order: str, groups: int, gate: str
) -> Tensor:
    how = dict(order=order, groups=groups, gate=gate, eps=0.0)
    return gate_norm_forward(y_RI, z_RI, weight_I, rstd=rstd_RG, part="rest", **how)[0]


@torch.library.custom_op("mambadsl::cut_norm_products", mutates_args=())
def _products(
    dout_RI: Tensor, y_RI: Tensor, z_RI: Tensor, weight_I: Tensor, rstd_RG: Tensor, order: str, groups: int, gate: str
) -> Tensor:
    """Means over this rank's channels of the normed values times their gradients, [R, G] float32."""
    how, means_RG = dict(order=order, groups=groups, gate=gate, eps=0.0), torch.empty_like(rstd_RG)
    gate_norm_backward(
        dout_RI, y_RI, z_RI, weight_I, rstd_RG, dy=dout_RI, dz=dout_RI, part="means", means=means_RG, **how
    )
    return means_RG


@torch.library.custom_op("mambadsl::cut_norm_gradients", mutates_args=())
def _gradients(
    dout_RI: Tensor, y_RI: Tensor, z_RI: Tensor, weight_I: Tensor, rstd_RG: Tensor, means_RG: Tensor, order: str,
    groups: int, gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of y, z and the weight."""
    how = dict(order=order, groups=groups, gate=gate, eps=0.0)
    return gate_norm_backward(dout_RI, y_RI, z_RI, weight_I, rstd_RG, part="rest", means=means_RG, **how)


@_squares.register_fake
def _(y_RI, z_RI, order, groups, gate):
    return y_RI.new_empty(y_RI.shape[0], groups, dtype=torch.float32)


@_normed.register_fake
def _(y_RI, z_RI, weight_I, rstd_RG, order, groups, gate):
    return y_RI.new_empty(y_RI.shape)


@_products.register_fake
def _(dout_RI, y_RI, z_RI, weight_I, rstd_RG, order, groups, gate):
    return torch.empty_like(rstd_RG)


@_gradients.register_fake
def _(dout_RI, y_RI, z_RI, weight_I, rstd_RG, means_RG, order, groups, gate):
    return y_RI.new_empty(y_RI.shape), z_RI.new_empty(z_RI.shape), torch.empty_like(weight_I)
