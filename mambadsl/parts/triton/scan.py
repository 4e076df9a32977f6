"""The slot `mamba2.scan` as an opaque op with a gradient, of the states too, by our kernels or mamba_ssm's.

In and out: as `kinds/ssd.py`'s `ssd`, the definition. Refuses (ValueError): as the scans.

Letters: B batch, T time, H heads, P head_dim, N d_state, G groups, c chunks, Q tokens of a chunk.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from mambadsl.parts.triton.ssd import steps
from mambadsl.parts.triton.ssd.kernels import chunk_length, documents, kernels
from mambadsl.parts.triton.ssd.scan import Inputs


@torch.library.custom_op("mambadsl::mamba2_scan", mutates_args=())
def _op(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor,
    state_BHPN: Optional[Tensor], document_BT: Optional[Tensor], chunk: int, by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, and for the backward: step sizes, decays, the states before each chunk."""
    with torch.cuda.device_of(x_BTHP):
        step, decay = steps.forward(steps.Steps(dt_BTH, A_H), chunk=chunk)
        inputs = Inputs(x_BTHP, B_BTGN, C_BTGN, step, decay, D_H, document_BT)
        y_BTHP, last_BHPN, before_BcHPN = kernels(by).scan.forward(inputs, state_BHPN, last=True)
    return y_BTHP, last_BHPN, step, decay, before_BcHPN


@_op.register_fake
def _(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, document_BT, chunk, by):
    (B, T, H, P), N = x_BTHP.shape, B_BTGN.shape[-1]
    c = (T + chunk - 1) // chunk
    step = (B, c, H, chunk)
    return (
        x_BTHP.new_empty(B, T, H, P), x_BTHP.new_empty(B, H, P, N, dtype=torch.float32),
        dt_BTH.new_empty(step, dtype=torch.float32), dt_BTH.new_empty(step, dtype=torch.float32),
        x_BTHP.new_empty(B, c, H, P, N),
    )


@torch.library.custom_op("mambadsl::mamba2_scan_backward", mutates_args=())
def _backward_op(
    dy_BTHP: Tensor, dlast_BHPN: Optional[Tensor], step: Tensor, decay: Tensor, before_BcHPN: Tensor, x_BTHP: Tensor,
    dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, document_BT: Optional[Tensor],
    wants_dstate: bool, by: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, B, C; of A, a bias of dt and D [3, H] float32; of the first state (empty if not wanted)."""
    with torch.cuda.device_of(x_BTHP):
        inputs = Inputs(x_BTHP, B_BTGN, C_BTGN, step, decay, D_H, document_BT)
        dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x_BTHP, B_BTGN, C_BTGN))
        ddt = torch.empty(dt_BTH.shape, dtype=dt_BTH.dtype, device=dt_BTH.device)
        parts, dstate = kernels(by).scan.backward(
            inputs, dy_BTHP.contiguous(), before_BcHPN,
            None if dlast_BHPN is None else dlast_BHPN.contiguous(), dx=dx, dB=dB, dC=dC, wants_dstate=wants_dstate,
        )
        dheads_3H = steps.backward(steps.Steps(dt_BTH, A_H), parts, ddt=ddt)
    return dx, ddt, dB, dC, dheads_3H, x_BTHP.new_empty(0, dtype=torch.float32) if dstate is None else dstate


@_backward_op.register_fake
def _(
    dy_BTHP, dlast_BHPN, step, decay, before_BcHPN, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, document_BT,
    wants_dstate, by,
):
    B, _, H, P, N = before_BcHPN.shape
    state = (B, H, P, N) if wants_dstate else (0,)
    return (
        x_BTHP.new_empty(x_BTHP.shape), dt_BTH.new_empty(dt_BTH.shape), B_BTGN.new_empty(B_BTGN.shape),
        C_BTGN.new_empty(C_BTGN.shape), A_H.new_empty(3, H, dtype=torch.float32),
        x_BTHP.new_empty(state, dtype=torch.float32),
    )


def _save(ctx, inputs, output):
    *tensors, state_BHPN, document_BT, _, ctx.by = inputs
    ctx.wants_dstate = state_BHPN is not None and state_BHPN.requires_grad
    ctx.state_dtype = None if state_BHPN is None else state_BHPN.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *tensors, document_BT)


def _backward(ctx, dy_BTHP, dlast_BHPN, *_):
    if dy_BTHP is None and dlast_BHPN is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    x_BTHP, A_H, D_H = saved[3], saved[5], saved[8]
    dy_BTHP = torch.zeros_like(x_BTHP) if dy_BTHP is None else dy_BTHP
    dx, ddt, dB, dC, (dA_H, _, dD_H), dstate = _backward_op(dy_BTHP, dlast_BHPN, *saved, ctx.wants_dstate, ctx.by)
    dstate = dstate.to(ctx.state_dtype) if ctx.wants_dstate else None
    return dx, ddt, dA_H.to(A_H.dtype), dB, dC, dD_H.to(D_H.dtype), dstate, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def make_scan(*, chunk: int | None = None, by: str = "triton") -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the slot `mamba2.scan`. chunk, by: as `core.make_core`'s."""
    if chunk is not None:
        chunk_length(chunk, chunk, of=by)
    fixed = chunk

    def scan(
        x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, *, chunk: int,
        segments_BT: Tensor | None = None, state_BHPN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y_BTHP, last_BHPN, *_ = _op(
            _dense(x_BTHP), dt_BTH, A_H, _dense(B_BTGN), _dense(C_BTGN), D_H,
            None if state_BHPN is None else state_BHPN.contiguous(), documents(segments_BT),
            chunk_length(chunk, fixed, of=by, dtype=x_BTHP.dtype), by,
        )
        return y_BTHP, last_BHPN

    return scan


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
