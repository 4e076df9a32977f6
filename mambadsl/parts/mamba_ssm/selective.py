"""The slot `mamba1.scan` by mamba_ssm's CUDA kernel, which knows neither documents nor states: tokens say both.

In and out: as `kinds/mamba1/module.py`'s `selective_scan`, the definition; computed in float32. Refuses (ValueError)
more than 256 states, and sizes beyond the kernel's 32-bit offsets. A token that takes no step (dt 0) leaves the
state as it is, so the row is given tokens of its own around the real ones, and every word of the slot holds
exactly, gradients included:

    first state   N tokens in front; number n adds state n: dt 2**-60 (no decay in float32), x 2**60 times it, B 1 at n
    documents     a token between each two; where a document begins: dt so large that nothing is left, x 0; else dt 0
    last state    N tokens behind, dt 0; number n reads state n: C 1 at n

Letters: B batch, T time, I d_inner, N d_state, L tokens of the kernel's row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.kinds.rows import starts
from mambadsl.parts.mamba_ssm.load import selective_scan_extension

OFFSETS = 2**31
LARGEST_STATE = 256
#: Tokens of one block of the kernel; it keeps a state for each.
BLOCK = 2048
#: A step that decays nothing, and one that leaves nothing (for A from -1e-17 on).
TINY, HUGE = 2.0**-60, 1e20


@torch.library.custom_op("mambadsl::selective_scan", mutates_args=())
def _op(
    x_BLI: Tensor, dt_BLI: Tensor, A_IN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_I: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, L, I], and the states after each block, all float32."""
    with torch.cuda.device_of(x_BLI):
        x_BIL, dt_BIL, B_BNL, C_BNL = map(_turned, (x_BLI, dt_BLI, B_BLN, C_BLN))
        y_BIL, states = selective_scan_extension().fwd(
            x_BIL, dt_BIL, A_IN, B_BNL[:, None], C_BNL[:, None], D_I, None, None, False
        )
    return _turned(y_BIL), states.contiguous()


@_op.register_fake
def _(x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I):
    B, L, I = x_BLI.shape
    return x_BLI.new_empty(B, L, I), x_BLI.new_empty(B, I, (L + BLOCK - 1) // BLOCK, 2 * A_IN.shape[1])


@torch.library.custom_op("mambadsl::selective_scan_backward", mutates_args=())
def _backward_op(
    dy_BLI: Tensor, states: Tensor, x_BLI: Tensor, dt_BLI: Tensor, A_IN: Tensor, B_BLN: Tensor, C_BLN: Tensor,
    D_I: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x_BLI):
        dy_BIL, x_BIL, dt_BIL, B_BNL, C_BNL = map(_turned, (dy_BLI, x_BLI, dt_BLI, B_BLN, C_BLN))
        dx, ddt, dA, dB, dC, dD, *_ = selective_scan_extension().bwd(
            x_BIL, dt_BIL, A_IN, B_BNL[:, None], C_BNL[:, None], D_I, None, None, dy_BIL, states, None, None, False,
            False,
        )
    dx, ddt, dB, dC = map(_turned, (dx, ddt, dB.squeeze(1), dC.squeeze(1)))
    return dx, ddt, dA, dB, dC, dD


@_backward_op.register_fake
def _(dy_BLI, states, x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I):
    return tuple(t.new_empty(t.shape) for t in (x_BLI, dt_BLI, A_IN, B_BLN, C_BLN, D_I))


def _turned(t: Tensor) -> Tensor:
    """Time last, as the kernel wants it, or back: a copy, so that gradients come in the layout of what they are of."""
    return t.transpose(1, 2).contiguous()


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx, dy_BLI, _):
    return _backward_op(dy_BLI, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_save)


def make_selective_scan() -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the slot `mamba1.scan`."""
    return selective_scan


def selective_scan(
    x_BTI: Tensor, dt_BTI: Tensor, A_IN: Tensor, B_BTN: Tensor, C_BTN: Tensor, D_I: Tensor, *, chunk: int,
    segments_BT: Tensor | None = None, state_BIN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kinds.mamba1.module.selective_scan`; `chunk` is the kernel's own. ValueError for sizes it does not take."""
    (B, T, I), N = x_BTI.shape, A_IN.shape[1]
    tokens = T if segments_BT is None else 2 * T
    front = 0 if state_BIN is None else N
    _check(B, I, N, front + tokens + N)
    x, dt, B_, C_ = (t.float() for t in (x_BTI, dt_BTI, B_BTN, C_BTN))
    if segments_BT is not None:
        ends_BTI = torch.where(starts(segments_BT), HUGE, 0.0)[..., None].expand(B, T, I)
        x, B_, C_ = (_after_zeros(t) for t in (x, B_, C_))
        dt = torch.stack([ends_BTI, dt], dim=2).flatten(1, 2)
    one_BNN = torch.eye(N, device=x.device).expand(B, N, N)
    x_BLI, dt_BLI, B_BLN, C_BLN = (F.pad(t, (0, 0, front, N)) for t in (x, dt, B_, C_))
    C_BLN = torch.cat([C_BLN[:, :-N], one_BNN], dim=1)
    if state_BIN is not None:
        state_BNI = state_BIN.float().transpose(1, 2)
        x_BLI = torch.cat([state_BNI / TINY, x_BLI[:, N:]], dim=1)
        dt_BLI = torch.cat([torch.full_like(state_BNI, TINY), dt_BLI[:, N:]], dim=1)
        B_BLN = torch.cat([one_BNN, B_BLN[:, N:]], dim=1)
    y_BLI, _ = _op(x_BLI, dt_BLI, A_IN.float().contiguous(), B_BLN, C_BLN, D_I.float().contiguous())
    y_BTI = y_BLI[:, front : front + tokens]
    y_BTI = y_BTI if segments_BT is None else y_BTI[:, 1::2]
    return y_BTI.to(x_BTI.dtype), y_BLI[:, -N:].transpose(1, 2).contiguous()


def _after_zeros(t: Tensor) -> Tensor:
    """A zero in front of every token (dim 1)."""
    return torch.stack([torch.zeros_like(t), t], dim=2).flatten(1, 2)


def _check(B: int, I: int, N: int, L: int) -> None:
    if N > LARGEST_STATE:
        raise ValueError(f"mamba_ssm's selective scan takes up to {LARGEST_STATE} states, not {N}")
    states = B * I * ((L + BLOCK - 1) // BLOCK) * 2 * N
    for name, count in (("the input", B * I * L), ("its states", states)):
        if count >= OFFSETS:
            raise ValueError(
                f"mamba_ssm's selective scan counts elements in 32 bits: {name} has {count:,}, the limit is "
                f"{OFFSETS - 1:,}; use a smaller batch or shorter rows"
            )
