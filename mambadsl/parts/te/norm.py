"""RMS norm by Transformer Engine's kernels: the slot `model.norm`, as `rms_norm` defines it.

In: activations and the weight. Out: the normed activations. An opaque op with a registered gradient: torch.compile
traces it whole. Refuses a weight of another dtype than x, unless x is float32. Letters: M rows, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mambadsl.parts.te.load import load


def make_rms_norm() -> Callable[..., Tensor]:
    """A function for `model.norm`: `rms_norm`. ImportError without Transformer Engine."""
    load()
    return rms_norm


def rms_norm(
    x: Tensor, weight_D: Tensor | None, *, eps: float, zero_centered: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight (1 + weight where zero_centered) in `dtype` (None: that of x), computed in
    float32.

    Raises ValueError for dtypes that the kernel does not take together.
    """
    if weight_D is None:
        weight_D, zero_centered = x.new_ones(x.shape[-1]), False
    elif x.dtype == torch.float32:
        weight_D = weight_D.float()
    elif weight_D.dtype != x.dtype:
        raise ValueError(f"the norm's weight must have the dtype of its input, {x.dtype}, not {weight_D.dtype}")
    y_MD, _ = torch.ops.mambadsl.te_rms_norm(x.reshape(-1, x.shape[-1]), weight_D, float(eps), zero_centered)
    return y_MD.view(x.shape).to(dtype or x.dtype)


@torch.library.custom_op("mambadsl::te_rms_norm", mutates_args=())
def _forward(x_MD: Tensor, weight_D: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """The normed rows, and 1 / root of each, float32 [M]."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.constants import TE_DType

    x_MD = x_MD.contiguous()
    y_MD, _, scale_M = tex.rmsnorm_fwd(x_MD, weight_D, eps, None, None, TE_DType[x_MD.dtype], 0, zero_centered)
    return y_MD, scale_M


@_forward.register_fake
def _(x_MD, weight_D, eps, zero_centered):
    return torch.empty_like(x_MD, memory_format=torch.contiguous_format), x_MD.new_empty(
        x_MD.shape[0], dtype=torch.float32
    )


@torch.library.custom_op("mambadsl::te_rms_norm_backward", mutates_args=())
def _backward(
    dy_MD: Tensor, x_MD: Tensor, scale_M: Tensor, weight_D: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    import transformer_engine_torch as tex

    dx_MD, dweight_D = tex.rmsnorm_bwd(dy_MD.contiguous(), x_MD.contiguous(), scale_M, weight_D, 0, zero_centered)
    return dx_MD, dweight_D


@_backward.register_fake
def _(dy_MD, x_MD, scale_M, weight_D, zero_centered):
    return torch.empty_like(x_MD, memory_format=torch.contiguous_format), torch.empty_like(weight_D)


def _keep(ctx, inputs, output):
    x_MD, weight_D, _, ctx.zero_centered = inputs
    ctx.save_for_backward(x_MD, weight_D, output[1])


def _gradient(ctx, dy_MD, _):
    x_MD, weight_D, scale_M = ctx.saved_tensors
    dx_MD, dweight_D = torch.ops.mambadsl.te_rms_norm_backward(dy_MD, x_MD, scale_M, weight_D, ctx.zero_centered)
    return dx_MD, dweight_D, None, None


_forward.register_autograd(_gradient, setup_context=_keep)
