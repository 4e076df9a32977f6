"""The slots `gated_delta_net.scan` and `kimi_delta.scan` by flash-linear-attention's kernels, as opaque ops.

In and out: as `gated_delta_rule` and `kimi_delta_rule` of the kinds, the definitions. The kernels know no documents in
a row: where one begins, the log decay is so low that nothing is left, so no list of documents is made, nothing waits
for the device, and a CUDA graph can hold it. Without a gradient, short rows go token by token.
Letters: B batch, T time, H heads, K key_heads, E key_dim, P value_dim, Q tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from mambadsl.kinds.chunks import LOWEST_LOG_DECAY
from mambadsl.kinds.rows import starts
from mambadsl.parts.fla import gated, kimi

RULES = {"gated": gated, "kimi": kimi}
#: Tokens of a row: a chunk at a time is faster beyond.
SHORT = 64


@torch.library.custom_op("mambadsl::fla_delta_rule", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Optional[Tensor],
    starts_BT: Optional[Tensor], rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, and for the backward pass: sums of log decays, and two products of each chunk."""
    with torch.cuda.device_of(q):
        (q, _), (k, _) = _unit(q), _unit(k)
        y, last, saved = RULES[rule].forward(
            q, k, v.contiguous(), _decay(log_decay, starts_BT), beta.contiguous(), state, k.shape[-1] ** -0.5
        )
    return y, last, *saved


@_op.register_fake
def _(q, k, v, log_decay, beta, state, starts_BT, rule):
    (B, T, H, P), E = v.shape, k.shape[-1]
    product = (B, T, H, RULES[rule].CHUNK)
    return (
        v.new_empty(B, T, H, P), v.new_empty(B, H, E, P, dtype=torch.float32), log_decay.new_empty(log_decay.shape),
        k.new_empty(product), k.new_empty(product if rule == "kimi" else (0,)),
    )


@torch.library.custom_op("mambadsl::fla_delta_rule_backward", mutates_args=())
def _backward_op(
    dy: Tensor, dlast: Optional[Tensor], sums: Tensor, one: Tensor, other: Tensor, q: Tensor, k: Tensor, v: Tensor,
    beta: Tensor, state: Optional[Tensor], starts_BT: Optional[Tensor], rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log decays, betas and the first state (empty without one)."""
    from fla.modules.norm.l2norm import l2norm_bwd

    with torch.cuda.device_of(q):
        (q, q_rstd), (k, k_rstd) = _unit(q), _unit(k)
        dq, dk, dv, ddecay, dbeta, dstate = RULES[rule].backward(
            dy.contiguous(), None if dlast is None else dlast.contiguous(), (sums, one, other), q, k, v.contiguous(),
            beta.contiguous(), state, k.shape[-1] ** -0.5,
        )
        dq, dk = l2norm_bwd(q, q_rstd, dq), l2norm_bwd(k, k_rstd, dk)
        if starts_BT is not None:
            ddecay = ddecay.masked_fill(_across(starts_BT, ddecay), 0)
    return dq, dk, dv, ddecay, dbeta, sums.new_empty(0) if dstate is None else dstate


@_backward_op.register_fake
def _(dy, dlast, sums, one, other, q, k, v, beta, state, starts_BT, rule):
    return (
        *(t.new_empty(t.shape) for t in (q, k, v, sums, beta)), sums.new_empty((0,) if state is None else state.shape)
    )


@torch.library.custom_op("mambadsl::fla_delta_steps", mutates_args=())
def _steps_op(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Optional[Tensor],
    starts_BT: Optional[Tensor], rule: str,
) -> tuple[Tensor, Tensor]:
    """y and the last state. No gradient."""
    with torch.cuda.device_of(q):
        return RULES[rule].steps(
            q.contiguous(), k.contiguous(), v.contiguous(), _decay(log_decay, starts_BT), beta.contiguous(), state,
            k.shape[-1] ** -0.5,
        )


@_steps_op.register_fake
def _(q, k, v, log_decay, beta, state, starts_BT, rule):
    (B, T, H, P), E = v.shape, k.shape[-1]
    return v.new_empty(B, T, H, P), v.new_empty(B, H, E, P, dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, _, beta, state, starts_BT, ctx.rule = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], q, k, v, beta, state, starts_BT)


def _backward(ctx, dy, dlast, *_):
    if dy is None and dlast is None:
        return (None,) * 8
    v, state = ctx.saved_tensors[5], ctx.saved_tensors[7]
    dy = torch.zeros_like(v) if dy is None else dy
    *grads, dstate = _backward_op(dy, dlast, *ctx.saved_tensors, ctx.rule)
    return *grads, None if state is None else dstate, None, None


_op.register_autograd(_backward, setup_context=_save)


def make_gated_delta_rule() -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the slot `gated_delta_net.scan`. ImportError without flash-linear-attention."""
    import fla.ops.gated_delta_rule  # noqa: F401

    return partial(_scan, "gated")


def make_kimi_delta_rule() -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the slot `kimi_delta.scan`. ImportError without flash-linear-attention."""
    import fla.ops.kda  # noqa: F401

    return partial(_scan, "kimi")


def _scan(
    rule: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, chunk: int, eps: float,
    segments_BT: Tensor | None = None, state_BHEP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`chunk` is the kernels' own; `eps` is theirs too (the parts refuse another)."""
    given = [q, k, v, log_decay.float(), beta.float(), None if state_BHEP is None else state_BHEP.float().contiguous()]
    starts_BT = None if segments_BT is None else starts(segments_BT)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in given if t is not None)
    if v.shape[1] <= SHORT and not trains:
        return _steps_op(*given, starts_BT, rule)
    y, last, *_ = _op(*given, starts_BT, rule)
    return y, last


def _unit(t: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, and what they were multiplied by."""
    from fla.modules.norm.l2norm import l2norm_fwd

    return l2norm_fwd(t.contiguous())


def _decay(log_decay: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Log decays whose sums are finite, and 0 after `exp` where a document begins."""
    log_decay = log_decay.clamp_min(LOWEST_LOG_DECAY).contiguous()
    return log_decay if starts_BT is None else log_decay.masked_fill_(_across(starts_BT, log_decay), LOWEST_LOG_DECAY)


def _across(starts_BT: Tensor, decay: Tensor) -> Tensor:
    return starts_BT.view(*starts_BT.shape, *(1,) * (decay.dim() - 2))
