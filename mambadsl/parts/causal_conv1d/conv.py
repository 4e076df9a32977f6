"""The slot `conv` of recurrent layers by causal_conv1d's kernels, as an opaque op with a gradient.

In and out: as `kinds/conv.py`'s `causal_conv`, the definition. Refuses: as `kernels.py` here.

Letters: B batch, T time, C channels, K taps, J = K - 1 earlier inputs, S = J + T.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from mambadsl.kinds.conv import _last_inputs
from mambadsl.kinds.rows import starts
from mambadsl.parts.causal_conv1d import kernels


@torch.library.custom_op("mambadsl::causal_conv", mutates_args=())
def _op(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Optional[Tensor], document_BT: Optional[Tensor],
    initial_BJC: Optional[Tensor],
) -> Tensor:
    return kernels.forward(x_BTC, weight_CK, bias_C, document_BT=document_BT, initial_BJC=initial_BJC)


@_op.register_fake
def _(x_BTC, weight_CK, bias_C, document_BT, initial_BJC):
    return x_BTC.new_empty(x_BTC.shape)


@torch.library.custom_op("mambadsl::causal_conv_backward", mutates_args=())
def _backward_op(
    dy_BTC: Tensor, x_BTC: Tensor, weight_CK: Tensor, bias_C: Optional[Tensor], document_BT: Optional[Tensor],
    initial_BJC: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    dx_BTC, flat, dinitial_BJC = kernels.backward(
        dy_BTC, x_BTC, weight_CK, bias_C, document_BT=document_BT, initial_BJC=initial_BJC
    )
    return dx_BTC, flat, x_BTC.new_empty(0) if dinitial_BJC is None else dinitial_BJC


@_backward_op.register_fake
def _(dy_BTC, x_BTC, weight_CK, bias_C, document_BT, initial_BJC):
    weights = weight_CK.numel() + (0 if bias_C is None else bias_C.numel())
    dinitial = x_BTC.new_empty(0) if initial_BJC is None else initial_BJC.new_empty(initial_BJC.shape)
    return x_BTC.new_empty(x_BTC.shape), weight_CK.new_empty(weights), dinitial


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy_BTC):
    x_BTC, weight_CK, bias_C, document_BT, initial_BJC = ctx.saved_tensors
    dx_BTC, flat, dinitial_BJC = _backward_op(dy_BTC, x_BTC, weight_CK, bias_C, document_BT, initial_BJC)
    taps = weight_CK.numel()
    dbias_C = None if bias_C is None else flat[taps:]
    return dx_BTC, flat[:taps].view_as(weight_CK), dbias_C, None, None if initial_BJC is None else dinitial_BJC


_op.register_autograd(_backward, setup_context=_save)


def make_conv() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of the slots `mamba2.conv`, `mamba1.conv` and their like."""
    return causal_conv


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None, state_BCJ: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `kinds.conv.causal_conv`. ValueError for sizes that the kernels do not take."""
    if state_BCJ is None:
        return _op(x_BTC, weight_CK, bias_C, _documents(segments_BT), None), None
    J = weight_CK.shape[1] - 1
    before_BJC = state_BCJ.transpose(1, 2).to(x_BTC.dtype)
    if segments_BT is None:
        y_BTC = _op(x_BTC, weight_CK, bias_C, None, before_BJC.contiguous())
        last_BSC = torch.cat([before_BJC, x_BTC[:, max(x_BTC.shape[1] - J, 0) :]], dim=1)
        return y_BTC, _last_inputs(last_BSC, J, None, None)
    # The kernels take documents or a state, not both: the state's inputs go in front, as tokens.
    x_BSC = torch.cat([before_BJC, x_BTC], dim=1)
    segments_BS = torch.cat([segments_BT[:, :1].expand(-1, J), segments_BT], dim=1)
    y_BSC = _op(x_BSC, weight_CK, bias_C, _documents(segments_BS), None)
    return y_BSC[:, J:], _last_inputs(x_BSC, J, segments_BT, lengths_B)


def _documents(segments_BT: Tensor | None) -> Tensor | None:
    """Counted from 0: the kernels compare numbers, and skip tokens with negative ones."""
    return None if segments_BT is None else starts(segments_BT).cumsum(1, dtype=torch.int32)
