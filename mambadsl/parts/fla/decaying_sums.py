"""The slot `rg_lru.scan` by flash-linear-attention's kernels of HGRN, as an opaque op.

In and out: as `decaying_sums` of the kind, the definition. fla's kernel goes token by token and knows first and last
states, with their gradients; so that a long row is not one long walk, it is cut into runs, which are walked side by
side: once for what each adds, then, run by run, for the states between them, and once more from these. (fla's own form
in chunks has no gradients of states.) Where a document begins, the log decay is so low that nothing is left.
Letters: B batch, T time, I d_inner, r runs.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from mambadsl.kinds.chunks import LOWEST_LOG_DECAY
from mambadsl.kinds.rows import starts

#: Tokens of a run.
RUN = 128


def make_decaying_sums() -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the slot `rg_lru.scan`. ImportError without flash-linear-attention."""
    import fla.ops.hgrn.fused_recurrent  # noqa: F401

    return decaying_sums


def decaying_sums(
    u_BTI: Tensor, log_decay_BTI: Tensor, *, chunk: int, segments_BT: Tensor | None = None,
    state_BI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kinds.rg_lru.module.decaying_sums`; `chunk` is of no use here."""
    log_decay_BTI = log_decay_BTI.float()
    if segments_BT is not None:
        log_decay_BTI = log_decay_BTI.masked_fill(starts(segments_BT)[..., None], LOWEST_LOG_DECAY)
    h_BTI = _op(u_BTI.float(), log_decay_BTI, None if state_BI is None else state_BI.float())
    # Padding adds and decays nothing: the last token's is the last one. A copy, or a state would keep the whole row.
    return h_BTI, h_BTI[:, -1].clone()


@torch.library.custom_op("mambadsl::fla_decaying_sums", mutates_args=())
def _op(u_BTI: Tensor, log_decay_BTI: Tensor, state_BI: Optional[Tensor]) -> Tensor:
    """h [B, T, I] float32."""
    from fla.ops.hgrn.fused_recurrent import fused_recurrent_hgrn_fwd as walk

    u, decay = u_BTI.contiguous(), log_decay_BTI.contiguous()
    state = None if state_BI is None else state_BI.contiguous()
    with torch.cuda.device_of(u):
        if u.shape[1] <= RUN:
            return walk(u, decay, state)[0]
        given, how = _row(u, decay), dict(cu_seqlens=_bounds(u))
        added_BrI = walk(*given, output_final_state=True, **how)[1].unflatten(0, (len(u), -1))
        after_BrI = walk(added_BrI[:, :-1].contiguous(), _whole(decay), state)[0]
        before_BrI = _before(after_BrI, state)
        return walk(*given, before_BrI.flatten(0, 1), **how)[0].view(u.shape)


@_op.register_fake
def _(u_BTI, log_decay_BTI, state_BI):
    return u_BTI.new_empty(u_BTI.shape)


@torch.library.custom_op("mambadsl::fla_decaying_sums_backward", mutates_args=())
def _backward_op(
    dh_BTI: Tensor, h_BTI: Tensor, log_decay_BTI: Tensor, state_BI: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, log decays and the first state (empty without one)."""
    from fla.ops.hgrn.fused_recurrent import fused_recurrent_hgrn_bwd as back
    from fla.ops.hgrn.fused_recurrent import fused_recurrent_hgrn_fwd as walk

    h, dh, decay = h_BTI.contiguous(), dh_BTI.contiguous(), log_decay_BTI.contiguous()
    state = None if state_BI is None else state_BI.contiguous()
    with torch.cuda.device_of(h):
        if h.shape[1] <= RUN:
            du, ddecay, dstate = back(decay, h, dh, initial_state=state)
        else:
            given, how = _row(decay, h, dh), dict(cu_seqlens=_bounds(h))
            before_BrI = _before(h[:, RUN - 1 : -1 : RUN], state)
            how["initial_state"] = before_BrI.flatten(0, 1)
            # What each run asks of the state before it, then from the last run to the first what those behind it do.
            asked_BrI = back(*given, **how)[2].view_as(before_BrI)
            decay_BrI = torch.cat([torch.zeros_like(asked_BrI[:, :1]), _whole(decay)[:, 1:].flip(1)], 1)
            dafter_BrI = walk(asked_BrI[:, 1:].flip(1), decay_BrI)[0].flip(1)
            dafter_BrI = torch.cat([dafter_BrI, torch.zeros_like(asked_BrI[:, :1])], 1)
            du, ddecay, dbefore = back(*given, dht=dafter_BrI.flatten(0, 1), **how)
            du, ddecay, dstate = du.view(h.shape), ddecay.view(h.shape), dbefore.view_as(before_BrI)[:, 0].contiguous()
    return du, ddecay, h.new_empty(0) if state is None else dstate


@_backward_op.register_fake
def _(dh_BTI, h_BTI, log_decay_BTI, state_BI):
    return (
        h_BTI.new_empty(h_BTI.shape), h_BTI.new_empty(h_BTI.shape),
        h_BTI.new_empty((0,) if state_BI is None else state_BI.shape),
    )


def _save(ctx, inputs, output):
    _, log_decay_BTI, state_BI = inputs
    ctx.save_for_backward(output, log_decay_BTI, state_BI)


def _backward(ctx, dh_BTI):
    du, ddecay, dstate = _backward_op(dh_BTI, *ctx.saved_tensors)
    return du, ddecay, None if ctx.saved_tensors[2] is None else dstate


_op.register_autograd(_backward, setup_context=_save)


def _row(*tensors: Tensor) -> list[Tensor]:
    """All rows behind one another, [1, B * T, I]."""
    return [t.view(1, -1, t.shape[2]) for t in tensors]


def _bounds(t_BTI: Tensor) -> Tensor:
    """Where runs begin in that row, and its end."""
    B, T, _ = t_BTI.shape
    begins_Br = torch.arange(0, B * T, T, device=t_BTI.device)[:, None] + torch.arange(0, T, RUN, device=t_BTI.device)
    return torch.cat([begins_Br.flatten(), begins_Br.new_full((1,), B * T)])


def _whole(decay_BTI: Tensor) -> Tensor:
    """Log decays of all runs but the last, which may be shorter."""
    runs = (decay_BTI.shape[1] - 1) // RUN
    return decay_BTI[:, : runs * RUN].unflatten(1, (runs, RUN)).sum(2)


def _before(after_BrI: Tensor, state_BI: Tensor | None) -> Tensor:
    """The states before all runs, from those after all but the last."""
    first_BI = torch.zeros_like(after_BrI[:, 0]) if state_BI is None else state_BI
    return torch.cat([first_BI[:, None], after_BrI], 1)
