"""The delta rule of Kimi Delta Attention, a decay for each channel of keys, by flash-linear-attention's kernels: what
`delta_rule.py` runs.

q and k have length 1 already, but for `steps`; all tensors are contiguous. Decays may be as strong as they come
(fla's `safe_gate`, for bounded ones, stays off). Letters: B batch, T time, H heads, E key_dim, P value_dim, Q tokens
of a chunk.
"""

from __future__ import annotations

from torch import Tensor

CHUNK = 64


def forward(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHP: Tensor, log_decay_BTHE: Tensor, beta_BTH: Tensor,
    state_BHEP: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """y_BTHP, the last state, and for the backward pass: sums of log decays, and each chunk's scores and inverse
    [B, T, H, Q]."""
    from fla.ops.kda.chunk_fwd import chunk_kda_fwd

    y_BTHP, last_BHEP, sums_BTHE, score_BTHQ, inverse_BTHQ, *_ = chunk_kda_fwd(
        q=q_BTHE, k=k_BTHE, v=v_BTHP, g=log_decay_BTHE, beta=beta_BTH, scale=scale, initial_state=state_BHEP,
        output_final_state=True, chunk_size=CHUNK,
    )
    return y_BTHP, last_BHEP, (sums_BTHE, score_BTHQ, inverse_BTHQ)


def backward(
    dy_BTHP: Tensor, dlast_BHEP: Tensor | None, saved: tuple[Tensor, ...], q_BTHE: Tensor, k_BTHE: Tensor,
    v_BTHP: Tensor, beta_BTH: Tensor, state_BHEP: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, log decays, betas and the first state (None without one)."""
    from fla.ops.kda.chunk_bwd import chunk_kda_bwd

    sums_BTHE, score_BTHQ, inverse_BTHQ = saved
    dq, dk, dv, dbeta, ddecay, dstate_BHEP, _, _ = chunk_kda_bwd(
        q=q_BTHE, k=k_BTHE, v=v_BTHP, beta=beta_BTH, Aqk=score_BTHQ, Akk=inverse_BTHQ, scale=scale,
        initial_state=state_BHEP, do=dy_BTHP, dht=dlast_BHEP, g=sums_BTHE, chunk_size=CHUNK,
    )
    return dq, dk, dv, ddecay, dbeta, dstate_BHEP


def steps(
    q_BTHE: Tensor, k_BTHE: Tensor, v_BTHP: Tensor, log_decay_BTHE: Tensor, beta_BTH: Tensor,
    state_BHEP: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:
    """y_BTHP and the last state, token by token; norms q and k. Without a gradient."""
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    return fused_recurrent_kda_fwd(
        q=q_BTHE, k=k_BTHE, v=v_BTHP, g=log_decay_BTHE, beta=beta_BTH, scale=scale, initial_state=state_BHEP,
        output_final_state=True, inplace_final_state=False, use_qk_l2norm_in_kernel=True,
    )
