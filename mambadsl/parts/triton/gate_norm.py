"""The gate, silu or sigmoid of z, and the grouped RMS norm, as opaque ops with a gradient.

In: tensors on a GPU as the slots `gate_norm` have them; out: their results, in the dtype of y. What is computed is
written in `kinds/gate_norm.py`, the kernels are in `gate_norm_kernels.py`, which refuse (ValueError) groups wider than
WIDEST_NORM channels.

Letters: B batch, T time, I channels, R rows (B * T), G groups.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from mambadsl.parts.triton.cut_norm import CutNorm
from mambadsl.parts.triton.gate_norm_kernels import gate_norm_backward, gate_norm_forward, rstds
from mambadsl.parts.triton.launch import dense_rows


@torch.library.custom_op("mambadsl::gate_norm", mutates_args=())
def _op(
    y_RI: Tensor, z_RI: Tensor, weight_I: Optional[Tensor], order: str, groups: int, eps: float, gate: str
) -> tuple[Tensor, Tensor]:
    return gate_norm_forward(y_RI, z_RI, weight_I, order=order, groups=groups, eps=eps, gate=gate)


@_op.register_fake
def _(y_RI, z_RI, weight_I, order, groups, eps, gate):
    return y_RI.new_empty(y_RI.shape), y_RI.new_empty(y_RI.shape[0], rstds(order, groups), dtype=torch.float32)


@torch.library.custom_op("mambadsl::gate_norm_backward", mutates_args=())
def _backward_op(
    dout_RI: Tensor, y_RI: Tensor, z_RI: Tensor, weight_I: Optional[Tensor], rstd_RG: Tensor, order: str, groups: int,
    eps: float, gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dy_RI, dz_RI, dweight_I = gate_norm_backward(
        dout_RI, y_RI, z_RI, weight_I, rstd_RG, order=order, groups=groups, eps=eps, gate=gate
    )
    return dy_RI, dz_RI, y_RI.new_empty(0) if weight_I is None else dweight_I


@_backward_op.register_fake
def _(dout_RI, y_RI, z_RI, weight_I, rstd_RG, order, groups, eps, gate):
    dweight_I = y_RI.new_empty(0) if weight_I is None else weight_I.new_empty(weight_I.shape)
    return y_RI.new_empty(y_RI.shape), z_RI.new_empty(z_RI.shape), dweight_I


def _save(ctx, inputs, output):
    y_RI, z_RI, weight_I, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y_RI, z_RI, weight_I, output[1])


def _backward(ctx, dout_RI, _):
    y_RI, z_RI, weight_I, rstd_RG = ctx.saved_tensors
    dy_RI, dz_RI, dweight_I = _backward_op(dense_rows(dout_RI), y_RI, z_RI, weight_I, rstd_RG, *ctx.settings)
    return dy_RI, dz_RI, None if weight_I is None else dweight_I, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def make_gate_norm() -> Callable[..., Tensor]:
    """The function of the slots `gate_norm`."""

    def gate_norm(
        y_BTI: Tensor, z_BTI: Tensor, weight_I: Tensor | None, *, order: str, groups: int, eps: float,
        gate: str = "silu", averaged: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        weight_I = None if order == "none" else weight_I
        rows, how = (dense_rows(y_BTI), dense_rows(z_BTI), weight_I), (order, groups, eps, gate)
        out_RI = _op(*rows, *how)[0] if averaged is None else CutNorm.apply(*rows, averaged, *how)
        return out_RI.view(y_BTI.shape)

    return gate_norm
