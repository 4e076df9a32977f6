"""The slot `conv` of recurrent layers by causal_conv1d's kernels, through the op of `parts/triton/conv.py`.

In and out: as `kinds/conv.py`'s `causal_conv`, the definition. Refuses: as `kernels.py` here.

Letters: B batch, T time, C channels, K taps, J = K - 1 earlier inputs, S = J + T.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mambadsl.kinds.conv import last_inputs
from mambadsl.parts.triton.conv import convolve
from mambadsl.parts.triton.ssd.kernels import documents

#: As `parts/triton/ssd/kernels.py` calls the package.
BY = "mamba_ssm"


def make_conv() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of the slots `mamba2.conv`, `mamba1.conv` and their like."""
    return causal_conv


def causal_conv(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None, state_BCJ: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `kinds.conv.causal_conv`. ValueError for sizes that the kernels do not take."""
    if state_BCJ is None:
        return convolve(x_BTC, weight_CK, bias_C, documents(segments_BT), None, BY), None
    J = weight_CK.shape[1] - 1
    before_BJC = state_BCJ.transpose(1, 2).to(x_BTC.dtype)
    if segments_BT is None:
        y_BTC = convolve(x_BTC, weight_CK, bias_C, None, before_BJC.transpose(1, 2), BY)
        last_BSC = torch.cat([before_BJC, x_BTC[:, max(x_BTC.shape[1] - J, 0) :]], dim=1)
        return y_BTC, last_inputs(last_BSC, J, None, None)
    # The kernels take documents or a state, not both: the state's inputs go in front, as tokens.
    x_BSC = torch.cat([before_BJC, x_BTC], dim=1)
    segments_BS = torch.cat([segments_BT[:, :1].expand(-1, J), segments_BT], dim=1)
    y_BSC = convolve(x_BSC, weight_CK, bias_C, documents(segments_BS), None, BY)
    return y_BSC[:, J:], last_inputs(x_BSC, J, segments_BT, lengths_B)
