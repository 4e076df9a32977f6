"""The slot `wkv4.scan` by flash-linear-attention's kernels of RWKV-4, as an opaque op.

In and out: as `weighted_means` of the kind, the definition. The kernels go token by token, all channels side by side,
and keep the sums after each token, in float32, for the backward pass. They cannot forget: a token's decay is its
channel's, and no key takes away what others added. Documents in a row, and padding, go to the definition itself.
Letters: B batch, T time, I d_inner, S = T + 1 sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mambadsl.kinds.wkv4 import module
from mambadsl.kinds.wkv4.module import Sums


def make_weighted_means() -> Callable[..., tuple[Tensor, Sums]]:
    """The function of the slot `wkv4.scan`. ImportError without flash-linear-attention."""
    import fla.ops.rwkv4.fused_recurrent  # noqa: F401

    return weighted_means


def weighted_means(
    k_BTI: Tensor, v_BTI: Tensor, rate_I: Tensor, first_I: Tensor, real_BT1: Tensor, *, chunk: int,
    segments_BT: Tensor | None = None, past: Sums | None = None,
) -> tuple[Tensor, Sums]:
    """As `kinds.wkv4.module.weighted_means`; `chunk` is of use to the definition only."""
    if segments_BT is not None:
        return module.weighted_means(
            k_BTI, v_BTI, rate_I, first_I, real_BT1, chunk=chunk, segments_BT=segments_BT, past=past
        )
    B, _, I = k_BTI.shape
    past = module.no_sums(B, I, k_BTI.device) if past is None else module.valid_sums(past)
    y_BTI, _, *sums = _op(k_BTI, v_BTI, rate_I.float(), first_I.float(), *past)
    return y_BTI, tuple(sums)


@torch.library.custom_op("mambadsl::fla_weighted_means", mutates_args=())
def _op(
    k_BTI: Tensor, v_BTI: Tensor, rate_I: Tensor, first_I: Tensor, values_BI: Tensor, weight_BI: Tensor,
    log_scale_BI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y in the dtype of v; for the backward pass the sums before and after each token [B, 3, S, I]; the last ones."""
    from fla.ops.rwkv4.fused_recurrent import fused_recurrent_rwkv4_forward

    with torch.cuda.device_of(k_BTI):
        past_B31I = torch.stack([values_BI, weight_BI, log_scale_BI], 1)[:, :, None]
        y_BTI, sums_B3SI = fused_recurrent_rwkv4_forward(
            -rate_I, first_I.contiguous(), _dense(k_BTI), _dense(v_BTI), past_B31I
        )
    values, weight, log_scale = (t.clone() for t in sums_B3SI[:, :, -1].unbind(1))
    return y_BTI.to(v_BTI.dtype), sums_B3SI, values, weight, log_scale


@_op.register_fake
def _(k_BTI, v_BTI, rate_I, first_I, values_BI, weight_BI, log_scale_BI):
    B, T, I = k_BTI.shape
    return (
        v_BTI.new_empty(v_BTI.shape), values_BI.new_empty(B, 3, T + 1, I),
        *(t.new_empty(t.shape) for t in (values_BI, weight_BI, log_scale_BI)),
    )


@torch.library.custom_op("mambadsl::fla_weighted_means_backward", mutates_args=())
def _backward_op(
    dy_BTI: Tensor, dvalues_BI: Tensor, dweight_BI: Tensor, sums_B3SI: Tensor, k_BTI: Tensor, v_BTI: Tensor,
    rate_I: Tensor, first_I: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all that the forward pass was given."""
    from fla.ops.rwkv4.fused_recurrent import fused_recurrent_rwkv4_backward

    with torch.cuda.device_of(k_BTI):
        # The last sums are of a scale that counts as given, as in the definition: what its own gradient takes away
        # from theirs is added here.
        dscale_BI = dvalues_BI * sums_B3SI[:, 0, -1] + dweight_BI * sums_B3SI[:, 1, -1]
        dlast_B31I = torch.stack([dvalues_BI, dweight_BI, dscale_BI], 1)[:, :, None]
        dlog_rate_I, dfirst_I, dk_BTI, dv_BTI, dpast_B31I = fused_recurrent_rwkv4_backward(
            -rate_I, first_I.contiguous(), _dense(k_BTI), _dense(v_BTI), sums_B3SI, _dense(dy_BTI), dlast_B31I
        )
    # A rate of 0 has no logarithm, and no gradient.
    drate_I = dlog_rate_I / rate_I.clamp_min(torch.finfo(torch.float32).tiny)
    return (
        dk_BTI.to(k_BTI.dtype), dv_BTI.to(v_BTI.dtype), drate_I, dfirst_I,
        *(t.clone() for t in dpast_B31I[:, :, 0].unbind(1)),
    )


@_backward_op.register_fake
def _(dy_BTI, dvalues_BI, dweight_BI, sums_B3SI, k_BTI, v_BTI, rate_I, first_I):
    like = k_BTI, v_BTI, rate_I, first_I, dvalues_BI, dweight_BI, dweight_BI
    return tuple(t.new_empty(t.shape) for t in like)


def _save(ctx, inputs, output):
    _, sums_B3SI, _, _, log_scale_BI = output
    ctx.mark_non_differentiable(sums_B3SI, log_scale_BI)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sums_B3SI, *inputs[:4])


def _backward(ctx, dy_BTI, _, dvalues_BI, dweight_BI, __):
    sums_B3SI, _, v_BTI, *_ = ctx.saved_tensors
    if dy_BTI is None and dvalues_BI is None and dweight_BI is None:
        return (None,) * 7
    dy_BTI = torch.zeros_like(v_BTI) if dy_BTI is None else dy_BTI
    dvalues_BI, dweight_BI = (
        torch.zeros_like(sums_B3SI[:, 0, 0]) if t is None else t for t in (dvalues_BI, dweight_BI)
    )
    return _backward_op(dy_BTI, dvalues_BI, dweight_BI, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_save)


def _dense(t: Tensor) -> Tensor:
    """What the kernel computes with, and keeps its sums in."""
    return t.float().contiguous()
