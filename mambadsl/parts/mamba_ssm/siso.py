"""The slot `mamba3.core` by mamba_ssm's kernels for one input a head, as an opaque op.

In and out: as `core` of the kind, the definition. Norms of B and C, step sizes and sums of angles are torch's: over
long rows these keep their digits (the package adds up approximations of tanh). Biases, turns, scan, D and gate
are one kernel. It is not told of documents: where one begins, the log decay is so low that nothing is left, so no
list of them is made, and nothing waits for the device. A single token with a state goes to the narrow slots: the
kernel works on a chunk at least.
Letters: B batch, T time, H heads, P head_dim, I = H * P, N d_state, G groups, A angles, E channels of in_proj.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from mambadsl.kinds.chunks import LOWEST_LOG_DECAY
from mambadsl.kinds.mamba3 import module
from mambadsl.kinds.rows import Rows, starts
from mambadsl.parts.mamba_ssm.load import siso_kernels
from mambadsl.parts.mamba_ssm.siso_kernels import Inputs, Kept, backward, forward


@torch.library.custom_op("mambadsl::mamba3_core", mutates_args=())
def _op(
    q_BTGN: Tensor, k_BTGN: Tensor, x_BTHP: Tensor, z_BTHP: Optional[Tensor], log_decay_BHT: Tensor, dt_BHT: Tensor,
    trap_BHT: Tensor, q_bias_HN: Tensor, k_bias_HN: Tensor, angle_BTHA: Tensor, D_H: Tensor,
    state_BHPN: Optional[Tensor], keep: bool, last: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """out [B, T, H, P], the last state (empty if not asked for), and what is kept (empty if not); see `Kept`."""
    i = Inputs(q_BTGN, k_BTGN, x_BTHP, z_BTHP, log_decay_BHT, dt_BHT, trap_BHT, q_bias_HN, k_bias_HN, angle_BTHA, D_H)
    with torch.cuda.device_of(x_BTHP):
        out_BTHP, last_BHPN, kept = forward(i, state_BHPN, keep=keep, last=last)
    nothing = x_BTHP.new_empty
    return out_BTHP, dt_BHT.new_empty(0) if last_BHPN is None else last_BHPN, *(
        t if keep and (name != "y" or z_BTHP is not None) else nothing(0, dtype=t.dtype)
        for name, t in kept._asdict().items()
    )


@_op.register_fake
def _(q, k, x, z, log_decay, dt, trap, q_bias, k_bias, angle, D, state, keep, last):
    kept = Kept.of(Inputs(q, k, x, z, log_decay, dt, trap, q_bias, k_bias, angle, D), keep=keep)
    B, _, H, P = x.shape
    return x.new_empty(x.shape), dt.new_empty((B, H, P, q.shape[-1]) if last else (0,)), *(
        t if keep and (name != "y" or z is not None) else t.new_empty(0) for name, t in kept._asdict().items()
    )


@torch.library.custom_op("mambadsl::mamba3_core_backward", mutates_args=())
def _backward_op(
    dout_BTHP: Tensor, dlast_BHPN: Optional[Tensor], y: Tensor, states: Tensor, sums: Tensor, ends: Tensor,
    q_turned: Tensor, k_turned: Tensor, pairs: Tensor, scale: Tensor, gamma: Tensor, q_BTGN: Tensor, k_BTGN: Tensor,
    x_BTHP: Tensor, z_BTHP: Optional[Tensor], log_decay_BHT: Tensor, dt_BHT: Tensor, trap_BHT: Tensor,
    q_bias_HN: Tensor, k_bias_HN: Tensor, angle_BTHA: Tensor, D_H: Tensor, has_state: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """Gradients of the twelve tensors that the forward pass was given; of z and the state, empty without one."""
    i = Inputs(q_BTGN, k_BTGN, x_BTHP, z_BTHP, log_decay_BHT, dt_BHT, trap_BHT, q_bias_HN, k_bias_HN, angle_BTHA, D_H)
    kept = Kept(y, states, sums, ends, q_turned, k_turned, pairs, scale, gamma)
    with torch.cuda.device_of(x_BTHP):
        grads, dstate = backward(
            i, kept, dout_BTHP.contiguous(), None if dlast_BHPN is None else dlast_BHPN.contiguous(),
            has_state=has_state,
        )
    return *(x_BTHP.new_empty(0) if t is None else t for t in grads), dt_BHT.new_empty(0) if dstate is None else dstate


@_backward_op.register_fake
def _(
    dout, dlast, y, states, sums, ends, q_turned, k_turned, pairs, scale, gamma, q, k, x, z, log_decay, dt, trap,
    q_bias, k_bias, angle, D, has_state,
):
    (B, _, H, P), N = x.shape, q.shape[-1]
    given = q, k, x, z, log_decay, dt, trap, q_bias, k_bias, angle, D
    return *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given), dt.new_empty(
        (B, H, P, N) if has_state else (0,)
    )


def _save(ctx, inputs, output):
    *tensors, state_BHPN, _, _ = inputs
    ctx.has_state = state_BHPN is not None
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *tensors)


def _backward(ctx, dout_BTHP, dlast_BHPN, *_):
    if dout_BTHP is None and dlast_BHPN is None:
        return (None,) * 14
    x_BTHP, z_BTHP = ctx.saved_tensors[11:13]
    dout_BTHP = torch.zeros_like(x_BTHP) if dout_BTHP is None else dout_BTHP
    dq, dk, dx, dz, *rest, dstate = _backward_op(dout_BTHP, dlast_BHPN, *ctx.saved_tensors, ctx.has_state)
    return dq, dk, dx, None if z_BTHP is None else dz, *rest, dstate if ctx.has_state else None, None, None


_op.register_autograd(_backward, setup_context=_save)


def make_siso() -> Callable[[Any, Tensor, Rows, dict[str, Any] | None], Tensor]:
    """The function of the slot `mamba3.core`. ImportError without mamba_ssm, or where it has no Mamba-3."""
    siso_kernels()
    return core


def core(layer: Any, projected_BTE: Tensor, rows: Rows, state: dict[str, Any] | None) -> Tensor:
    """As `kinds.mamba3.module.core`, of layers with one input a head."""
    if state is not None and projected_BTE.shape[1] == 1:
        return module.core(layer, projected_BTE, rows, state)
    i, dtype = layer.inputs(projected_BTE, rows, state), projected_BTE.dtype
    log_decay_BTH = i.log_decay_BTH.clamp_min(LOWEST_LOG_DECAY)
    if rows.segments_BT is not None:
        log_decay_BTH = log_decay_BTH.masked_fill(starts(rows.segments_BT)[..., None], LOWEST_LOG_DECAY)
    q_BTGN, k_BTGN = (t_BT1GN[:, :, 0].to(dtype).contiguous() for t_BT1GN in (i.c_BTRGN, i.b_BTRGN))
    gates = layer.f.gated_norm == "none"
    z_BTHP = i.z_BTI.unflatten(-1, i.x_BTHP.shape[2:]).contiguous() if gates else None
    of_heads = (t_BTH.transpose(1, 2).contiguous() for t_BTH in (log_decay_BTH, i.dt_BTH, i.trap_BTH))
    start_BHPN = layer.started(state, rows, (1 - torch.sigmoid(i.trap_BTH)) * i.dt_BTH)
    given = (
        q_BTGN, k_BTGN, i.x_BTHP.contiguous(), z_BTHP, *of_heads, layer.c_bias[:, 0].float().contiguous(),
        layer.b_bias[:, 0].float().contiguous(), i.angle_BTHA.contiguous(), layer.D.float(),
        None if start_BHPN is None else start_BHPN.contiguous(),
    )
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in given if t is not None)
    y_BTHP, last_BHPN, *_ = _op(*given, trains, state is not None)
    layer.keep(state, rows, i, last_BHPN)
    return y_BTHP.flatten(2) if gates else layer.gated(y_BTHP[:, :, :, None], i.z_BTI)
