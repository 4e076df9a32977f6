"""The short convolution by flash-linear-attention's Triton kernels: the slots `mamba2.conv` and `mamba1.conv`.

In: inputs and taps. Out: silu of the convolution, as `causal_conv` defines it. The kernels serve rows that are one
document from its start (training without packing); documents in a row, and a state, go to `causal_conv` itself:
fla's packed form wants a list of documents, whose length is known to the device only.
Letters: B batch, T time, C channels, K taps, J = K - 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mambadsl.kinds.conv import causal_conv


def make_conv() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function for the slot `conv`. ImportError without flash-linear-attention."""
    import fla.modules.causal_conv1d  # noqa: F401

    return conv


def conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None, state_BCJ: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `causal_conv`: [B, T, C] in the dtype of x, and None."""
    if segments_BT is not None or state_BCJ is not None:
        return causal_conv(
            x_BTC, weight_CK, bias_C, segments_BT=segments_BT, lengths_B=lengths_B, state_BCJ=state_BCJ
        )
    return torch.ops.mambadsl.fla_conv(x_BTC, weight_CK, bias_C), None


@torch.library.custom_op("mambadsl::fla_conv", mutates_args=())
def _forward(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d_fwd

    return causal_conv1d_fwd(x_BTC, weight_CK, bias_C, None, activation="silu")[0]


@_forward.register_fake
def _(x_BTC, weight_CK, bias_C):
    return torch.empty_like(x_BTC, memory_format=torch.contiguous_format)


@torch.library.custom_op("mambadsl::fla_conv_backward", mutates_args=())
def _backward(
    dy_BTC: Tensor, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the taps, and the bias (empty without one)."""
    from fla.modules.causal_conv1d import causal_conv1d_bwd

    dx_BTC, dweight_CK, dbias_C, _, _ = causal_conv1d_bwd(
        x_BTC, dy_BTC, None, weight=weight_CK, bias=bias_C, activation="silu"
    )
    return dx_BTC.contiguous(), dweight_CK, x_BTC.new_empty(0) if dbias_C is None else dbias_C


@_backward.register_fake
def _(dy_BTC, x_BTC, weight_CK, bias_C):
    dx_BTC = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
    return dx_BTC, torch.empty_like(weight_CK), x_BTC.new_empty(0) if bias_C is None else torch.empty_like(bias_C)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy_BTC):
    x_BTC, weight_CK, bias_C = ctx.saved_tensors
    dx_BTC, dweight_CK, dbias_C = torch.ops.mambadsl.fla_conv_backward(dy_BTC, x_BTC, weight_CK, bias_C)
    return dx_BTC, dweight_CK, None if bias_C is None else dbias_C


_forward.register_autograd(_gradient, setup_context=_keep)
