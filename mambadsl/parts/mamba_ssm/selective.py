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
    x_BIL: Tensor, dt_BIL: Tensor, A_IN: Tensor, B_BNL: Tensor, C_BNL: Tensor, D_I: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, I, L], and the states after each block, all float32."""
    with torch.cuda.device_of(x_BIL):
        y_BIL, states = selective_scan_extension().fwd(
            x_BIL, dt_BIL, A_IN, B_BNL[:, None], C_BNL[:, None], D_I, None, None, False
        )
    return y_BIL, states


@_op.register_fake
def _(x_BIL, dt_BIL, A_IN, B_BNL, C_BNL, D_I):
    B, I, L = x_BIL.shape
    return torch.empty_like(dt_BIL), x_BIL.new_empty(B, I, (L + BLOCK - 1) // BLOCK, 2 * A_IN.shape[1])


@torch.library.custom_op("mambadsl::selective_scan_backward", mutates_args=())
def _backward_op(
    dy_BIL: Tensor, states: Tensor, x_BIL: Tensor, dt_BIL: Tensor, A_IN: Tensor, B_BNL: Tensor, C_BNL: Tensor,
    D_I: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x_BIL):
        dx, ddt, dA, dB, dC, dD, *_ = selective_scan_extension().bwd(
            x_BIL, dt_BIL, A_IN, B_BNL[:, None], C_BNL[:, None], D_I, None, None, dy_BIL, states, None, None, False,
            False,
        )
    return dx, ddt, dA, dB.squeeze(1), dC.squeeze(1), dD


@_backward_op.register_fake
def _(dy_BIL, states, x_BIL, dt_BIL, A_IN, B_BNL, C_BNL, D_I):
    return tuple(torch.empty_like(t) for t in (x_BIL, dt_BIL, A_IN, B_BNL, C_BNL, D_I))


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx, dy_BIL, _):
    return _backward_op(dy_BIL.contiguous(), *ctx.saved_tensors)


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
    x_BIT, dt_BIT = (t.float().transpose(1, 2) for t in (x_BTI, dt_BTI))
    B_BNT, C_BNT = (t.float().transpose(1, 2) for t in (B_BTN, C_BTN))
    if segments_BT is not None:
        ends_BIT = torch.where(starts(segments_BT), HUGE, 0.0)[:, None].expand(B, I, T)
        x_BIT, B_BNT, C_BNT = (_after_zeros(t) for t in (x_BIT, B_BNT, C_BNT))
        dt_BIT = torch.stack([ends_BIT, dt_BIT], dim=-1).flatten(-2)
    one_BNN = torch.eye(N, device=x_BTI.device).expand(B, N, N)
    x_BIL, dt_BIL, B_BNL, C_BNL = (F.pad(t, (front, N)) for t in (x_BIT, dt_BIT, B_BNT, C_BNT))
    C_BNL = torch.cat([C_BNL[..., :-N], one_BNN], dim=-1)
    if state_BIN is not None:
        x_BIL = torch.cat([state_BIN.float() / TINY, x_BIL[..., N:]], dim=-1)
        dt_BIL = torch.cat([torch.full_like(state_BIN, TINY, dtype=torch.float32), dt_BIL[..., N:]], dim=-1)
        B_BNL = torch.cat([one_BNN, B_BNL[..., N:]], dim=-1)
    y_BIL, _ = _op(*(t.contiguous() for t in (x_BIL, dt_BIL, A_IN.float(), B_BNL, C_BNL, D_I.float())))
    y_BIT = y_BIL[..., front : front + tokens]
    y_BIT = y_BIT if segments_BT is None else y_BIT[..., 1::2]
    return y_BIT.transpose(1, 2).to(x_BTI.dtype), y_BIL[..., -N:].contiguous()


def _after_zeros(t_BIT: Tensor) -> Tensor:
    """A zero in front of every token."""
    return torch.stack([torch.zeros_like(t_BIT), t_BIT], dim=-1).flatten(-2)


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
