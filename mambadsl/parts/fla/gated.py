"""The gated delta rule, one decay for each head, by flash-linear-attention's kernels: what `delta_rule.py` runs.

q and k have length 1 already, but for `steps`; all tensors are contiguous. Sums of log decays are to the base 2, within
chunks. One step of the backward pass is torch's: Triton 3.4 to 3.7.0 compiles fla's kernel for it wrongly on the H100
and H200, where fla refuses to run it (fla-org/flash-linear-attention#640).
Letters: B batch, T time, H heads, K key_heads, E key_dim, P value_dim, c chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambadsl.kinds.chunks import in_chunks

#: The kernel that solves a chunk's system at once takes this length only.
CHUNK = 64


def forward(
    q_BTKE: Tensor, k_BTKE: Tensor, v_BTHP: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, state_BHEP: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """y_BTHP, the last state, and for the backward pass: sums of log decays, and each chunk's inverse [B, T, H, Q]."""
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    sums_BTH, y_BTHP, inverse_BTHQ, last_BHEP, *_ = chunk_gated_delta_rule_fwd(
        q=q_BTKE, k=k_BTKE, v=v_BTHP, g=log_decay_BTH, beta=beta_BTH, scale=scale, initial_state=state_BHEP,
        output_final_state=True, chunk_size=CHUNK,
    )
    return y_BTHP, last_BHEP, (sums_BTH, inverse_BTHQ, inverse_BTHQ.new_empty(0))


def backward(
    dy_BTHP: Tensor, dlast_BHEP: Tensor | None, saved: tuple[Tensor, ...], q_BTKE: Tensor, k_BTKE: Tensor,
    v_BTHP: Tensor, beta_BTH: Tensor, state_BHEP: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, log decays, betas and the first state (None without one)."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
    from fla.ops.common.chunk_o import chunk_bwd_dv_local
    from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd
    from fla.ops.utils import chunk_local_cumsum

    sums_BTH, inverse_BTHQ, _ = saved
    solved = dict(k=k_BTKE, v=v_BTHP, beta=beta_BTH, A=inverse_BTHQ, g=sums_BTH)
    taken_BTHE, alone_BTHP = recompute_w_u_fwd(**solved)
    before, new_BTHP, _ = chunk_gated_delta_rule_fwd_h(
        k=k_BTKE, w=taken_BTHE, u=alone_BTHP, g=sums_BTH, initial_state=state_BHEP, chunk_size=CHUNK
    )
    dnew_BTHP = chunk_bwd_dv_local(q=q_BTKE, k=k_BTKE, do=dy_BTHP, g=sums_BTH, scale=scale, chunk_size=CHUNK)
    dafter, dstate_BHEP, dnew_BTHP = chunk_gated_delta_rule_bwd_dhu(
        q=q_BTKE, k=k_BTKE, w=taken_BTHE, do=dy_BTHP, dv=dnew_BTHP, g=sums_BTH, h0=state_BHEP, dht=dlast_BHEP,
        scale=scale, chunk_size=CHUNK,
    )
    dq, dk, dtaken, dsums = read_and_written(
        q_BTKE, k_BTKE, new_BTHP, dy_BTHP, dnew_BTHP, sums_BTH, before, dafter, scale=scale
    )
    dk_solved, dv, dbeta, dsums_solved = prepare_wy_repr_bwd(**solved, dw=dtaken, du=dnew_BTHP)
    ddecay = chunk_local_cumsum(dsums + dsums_solved, chunk_size=CHUNK, reverse=True)
    return dq, dk + dk_solved, dv, ddecay, dbeta, dstate_BHEP


def steps(
    q_BTKE: Tensor, k_BTKE: Tensor, v_BTHP: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor, state_BHEP: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y_BTHP and the last state, token by token; norms q and k. Without a gradient."""
    from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gated_delta_rule_fwd

    return fused_recurrent_gated_delta_rule_fwd(
        q=q_BTKE, k=k_BTKE, v=v_BTHP, g=log_decay_BTH, beta=beta_BTH, scale=scale, initial_state=state_BHEP,
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )


def read_and_written(
    q_BTKE: Tensor, k_BTKE: Tensor, new_BTHP: Tensor, dy_BTHP: Tensor, dnew_BTHP: Tensor, sums_BTH: Tensor,
    before_BcHEP: Tensor, dafter_BcHEP: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and k [B, T, K, E] where y and the states are made, of what corrections take from the state before
    the chunk [B, T, H, E], and of the sums of log decays [B, T, H] float32 (a pair of tokens adds to one what it takes
    from the other, to the bit, or the sums over a chunk would be rounding). new: the corrected values."""
    (T, H), K, dtype = new_BTHP.shape[1:3], q_BTKE.shape[2], q_BTKE.dtype
    q, k = (_chunks(t.repeat_interleave(H // K, 2)) for t in (q_BTKE, k_BTKE))
    new, dy, dnew = map(_chunks, (new_BTHP, dy_BTHP, dnew_BTHP))
    sums_BcHQ = in_chunks(sums_BTH, CHUNK).transpose(2, 3)
    last = torch.arange(CHUNK - 1, T + CHUNK - 1, CHUNK, device=q.device).clamp_max(T - 1)
    end_BcH1 = sums_BTH[:, last, :, None]

    decay_BcHQQ = (sums_BcHQ[..., None] - sums_BcHQ[..., None, :]).clamp_max(0).exp2().tril()
    dscore = (dy @ new.mT) * decay_BcHQQ * scale
    pairs = dscore * (q @ k.mT)
    dscore = dscore.to(dtype)
    dread = (dy * (sums_BcHQ.exp2() * scale)[..., None]).to(dtype) @ before_BcHEP.mT
    dwritten = (new * (end_BcH1 - sums_BcHQ).clamp_max(0).exp2()[..., None]).to(dtype) @ dafter_BcHEP.mT
    written = (dwritten * k).sum(-1, dtype=torch.float32)
    dsums = pairs.sum(-1) - pairs.sum(-2) + (dread * q).sum(-1, dtype=torch.float32) - written
    dsums_BTH = _rows(dsums[..., None], T)[..., 0].contiguous()
    kept = (before_BcHEP * dafter_BcHEP).sum((-1, -2), dtype=torch.float32)
    dsums_BTH[:, last] += written.sum(-1) + kept * end_BcH1[..., 0].exp2()

    dq, dk = (_rows(t, T).unflatten(2, (K, -1)).sum(3) for t in (dread + dscore @ k, dwritten + dscore.mT @ q))
    return dq.contiguous(), dk.contiguous(), _rows(-(dnew @ before_BcHEP.mT), T).contiguous(), dsums_BTH


def _chunks(t_BTHX: Tensor) -> Tensor:
    """[B, c, H, Q, ...], zeros behind the last token."""
    return in_chunks(t_BTHX, CHUNK).transpose(2, 3)


def _rows(t_BcHQX: Tensor, T: int) -> Tensor:
    return t_BcHQX.transpose(2, 3).flatten(1, 2)[:, :T]
