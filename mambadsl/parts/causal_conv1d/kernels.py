"""causal_conv1d's CUDA kernels on rows of channels: what they ask for, checked first, and nothing else.

In: x_BTC, channels innermost (a slice of a wider buffer is fine); out: silu of the convolution, or gradients.
Refuses (ValueError) other than 2 to 4 taps, channels not a multiple of 8, and buffers beyond 32-bit offsets.
Rows whose strides or start the kernels cannot read are copied first.

Letters: B batch, T time, C channels, K taps, J = K - 1 earlier inputs.
"""

from __future__ import annotations

import functools
import importlib
import types

import torch
from torch import Tensor

#: The kernels read 8 channels at a time.
LANES = 8
OFFSETS = 2**31


@functools.cache
def extension() -> types.ModuleType:
    """The CUDA extension. ImportError where it is not installed or does not load."""
    importlib.import_module("causal_conv1d")
    return importlib.import_module("causal_conv1d_cuda")


def check(x_BTC: Tensor, weight_CK: Tensor) -> None:
    """ValueError for sizes that the kernels do not take."""
    C, K = weight_CK.shape
    if not 2 <= K <= 4:
        raise ValueError(f"causal_conv1d takes 2 to 4 taps, not {K}")
    if C % LANES:
        raise ValueError(f"causal_conv1d takes channels in multiples of {LANES}, not {C}: {C % LANES} are left over")
    reach = x_BTC.shape[0] * max(x_BTC.stride(0), x_BTC.shape[1] * x_BTC.stride(1))
    if reach >= OFFSETS:
        raise ValueError(
            f"causal_conv1d counts elements in 32 bits: the rows reach over {reach:,}, the limit is {OFFSETS - 1:,}; "
            "use a smaller batch or shorter rows"
        )


def forward(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, *, document_BT: Tensor | None = None,
    state_BCJ: Tensor | None = None, silu: bool = True,
) -> Tensor:
    """silu(conv(x)), or conv(x), [B, T, C] in the dtype of x. document_BT: int32, contiguous, not together with
    state_BCJ, the inputs before the first one."""
    check(x_BTC, weight_CK)
    x_BTC = _readable(x_BTC)
    y_BTC = torch.empty(x_BTC.shape, dtype=x_BTC.dtype, device=x_BTC.device)
    extension().causal_conv1d_fwd(
        x_BTC.transpose(1, 2), weight_CK, bias_C, document_BT, _channels_last(state_BCJ), y_BTC.transpose(1, 2),
        None, silu,
    )
    return y_BTC


def backward(
    dy_BTC: Tensor, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, *, document_BT: Tensor | None = None,
    state_BCJ: Tensor | None = None, dx: Tensor | None = None, silu: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (written to `dx` where given), of the weights and then the bias in one flat tensor of their
    dtype, and of the state."""
    check(x_BTC, weight_CK)
    x_BTC, dy_BTC = _readable(x_BTC), _readable(dy_BTC)
    in_place = dx is not None and _is_readable(dx)
    into = dx if in_place else torch.empty(x_BTC.shape, dtype=x_BTC.dtype, device=x_BTC.device)
    taps = weight_CK.numel()
    flat = torch.zeros(taps + (0 if bias_C is None else bias_C.numel()), dtype=torch.float32, device=x_BTC.device)
    state_BCJ = _channels_last(state_BCJ)
    dstate_BCJ = None if state_BCJ is None else torch.empty_like(state_BCJ)
    extension().causal_conv1d_bwd(
        x_BTC.transpose(1, 2), weight_CK, bias_C, dy_BTC.transpose(1, 2), document_BT, state_BCJ,
        None, into.transpose(1, 2), flat[:taps].view_as(weight_CK), None if bias_C is None else flat[taps:],
        dstate_BCJ, silu,
    )
    if dx is not None and not in_place:
        dx.copy_(into)
    return into if dx is None else dx, flat.to(weight_CK.dtype), dstate_BCJ


def _channels_last(t_BCJ: Tensor | None) -> Tensor | None:
    """The same values with the channels side by side in memory."""
    return None if t_BCJ is None else t_BCJ.transpose(1, 2).contiguous().transpose(1, 2)


def _is_readable(t_BTC: Tensor) -> bool:
    batch, time, channel = t_BTC.stride()
    start = t_BTC.storage_offset() * t_BTC.itemsize
    return channel == 1 and time > 1 and batch % LANES == 0 and time % LANES == 0 and start % 16 == 0


def _readable(t_BTC: Tensor) -> Tensor:
    return t_BTC if _is_readable(t_BTC) else t_BTC.clone(memory_format=torch.contiguous_format)
