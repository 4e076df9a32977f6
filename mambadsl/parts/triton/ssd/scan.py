"""The SSD scan by the kernels here: forward, and backward with the gradients written where they belong.

In: x, B and C (slices of wider rows are fine), step sizes and log decays in chunks, documents counted from 0; out: y
and the states. Refuses (ValueError) chunks of more than 128 tokens, rows that are not dense, step sizes and decays
that are not contiguous. dtypes: float32, bfloat16, float16; sums in float32, states between chunks in the dtype of x.
Letters as in `forward.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mambadsl.parts.triton.ssd.backward import SCORES, inputs_backward, scores_backward
from mambadsl.parts.triton.ssd.forward import SCAN, scan_forward
from mambadsl.parts.triton.ssd.groups import add_up, groups_backward
from mambadsl.parts.triton.ssd.shape import tiles
from mambadsl.parts.triton.ssd.states import chunk_states, pass_states, pass_states_backward
from mambadsl.parts.triton.ssd.steps import DecayParts


class Inputs(NamedTuple):
    """What forward and backward read. step, decay: float32, contiguous, 0 steps after the last token. document_BT:
    int32, contiguous, from 0 in each row; None: one a row."""

    x_BTHP: Tensor
    B_BTGN: Tensor
    C_BTGN: Tensor
    step_BcHQ: Tensor
    decay_BcHQ: Tensor
    D_H: Tensor | None
    document_BT: Tensor | None

    @property
    def step_BHcQ(self) -> Tensor:
        """Views with the heads first, as mamba_ssm lays them out."""
        return self.step_BcHQ.transpose(1, 2)

    @property
    def decay_BHcQ(self) -> Tensor:
        return self.decay_BcHQ.transpose(1, 2)

    def check(self) -> None:
        tiles(self.step_BcHQ.shape[3], SCAN)
        _check_dense(x=self.x_BTHP, B=self.B_BTGN, C=self.C_BTGN)
        for name in ("step_BcHQ", "decay_BcHQ", "document_BT"):
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous; its strides are {tensor.stride()}")


def forward(i: Inputs, state_BHPN: Tensor | None = None, *, last: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """y [B, T, H, P] in the dtype of x; the state after the last token, float32, if `last`; what `backward` needs: the
    states before each chunk, [B, c, H, P, N] in the dtype of x. state: before the first token, contiguous."""
    i.check()
    before_BcHPN, last_BHPN = states_before(i, state_BHPN, last=last)
    y_BTHP = scan_forward(
        i.x_BTHP, i.step_BcHQ, i.decay_BcHQ, i.B_BTGN, i.C_BTGN, before_BcHPN, i.D_H, i.document_BT
    )
    return y_BTHP, last_BHPN, before_BcHPN


def states_before(
    i: Inputs, state_BHPN: Tensor | None = None, *, last: bool
) -> tuple[Tensor, Tensor | None]:
    """The states before each chunk, and the one after the last token if `last`."""
    added_BcHPN = chunk_states(i.x_BTHP, i.B_BTGN, i.decay_BcHQ, i.step_BcHQ, i.document_BT)
    return pass_states(added_BcHPN, i.decay_BcHQ, state_BHPN, i.document_BT, last=last)


def backward(
    i: Inputs, dy_BTHP: Tensor, before_BcHPN: Tensor, dlast_BHPN: Tensor | None = None, *,
    dx: Tensor, dB: Tensor, dC: Tensor, wants_dstate: bool = False,
) -> tuple[DecayParts, Tensor | None]:
    """Writes the gradients of x, B and C; returns those of the decays in parts, and of the first state (float32)."""
    i.check()
    _check_dense(dy=dy_BTHP, dx=dx, dB=dB, dC=dC)
    shared = i.x_BTHP, i.step_BcHQ, i.decay_BcHQ, i.B_BTGN, i.C_BTGN
    dbefore_BcHPN = chunk_states(dy_BTHP, i.C_BTGN, i.decay_BcHQ, None, i.document_BT)
    dafter_BcHPN, across_BcHt, dstate_BHPN = pass_states_backward(
        dbefore_BcHPN, before_BcHPN, i.decay_BcHQ, dlast_BHPN, i.document_BT, first=wants_dstate
    )
    # Shares of the gradient of the running sums, which add up in the same way: of the scores' tiles, and of C.
    R = tiles(i.step_BcHQ.shape[3], SCORES)
    sums_tBcHQ = torch.empty(R + 1, *i.step_BcHQ.shape, dtype=torch.float32, device=dy_BTHP.device)
    step_BcHQ, after_BcHQ = inputs_backward(*shared, dafter_BcHPN, dy_BTHP, i.D_H, i.document_BT, dx=dx)
    dscores_BcMGQQ, dD_RBcH = scores_backward(
        *shared, dy_BTHP, i.document_BT, da=sums_tBcHQ[:R], has_D=i.D_H is not None
    )
    parts_B = groups_backward(
        i.x_BTHP, dafter_BcHPN, None, i.C_BTGN, dscores_BcMGQQ, i.decay_BcHQ, i.step_BcHQ, i.document_BT, out=dB
    )
    parts_C = groups_backward(
        dy_BTHP, before_BcHPN, i.C_BTGN, i.B_BTGN, dscores_BcMGQQ, i.decay_BcHQ, None, i.document_BT, out=dC,
        da=sums_tBcHQ[R],
    )
    add_up(parts_B, parts_C)
    parts = DecayParts(step_BcHQ[None], after_BcHQ[None], sums_tBcHQ, None, across_BcHt, dD_RBcH)
    return parts, dstate_BHPN


def _check_dense(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"the channels of {name} must lie side by side; its strides are {tensor.stride()}")
