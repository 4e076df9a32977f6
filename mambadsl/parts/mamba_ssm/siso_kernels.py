"""Mamba-3's scan with one input a head by mamba_ssm's Triton kernels: biases, turns, D and gate inside.

In: normed queries and keys of each group, x and z in one dtype, the rest in float32, all contiguous; out: what
`forward` says, and gradients of all of it. States between chunks are kept in the dtype of x (the package's own call
keeps bfloat16, and narrows all to it before). Refuses (ValueError) tensors whose offsets do not fit 32 bits.
Letters: B batch, T time, H heads, P head_dim, N d_state, G groups, A angles, c chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mambadsl.parts.mamba_ssm.launch import launch, strides
from mambadsl.parts.mamba_ssm.load import siso_kernels
from mambadsl.parts.mamba_ssm.ssd import check_offsets

#: Tokens of a chunk by the bytes of a number: what fits into shared memory.
CHUNKS = {2: 64, 4: 32}


class Inputs(NamedTuple):
    """q, k [B, T, G, N]; x, z [B, T, H, P]; log_decay, dt, trap (before its sigmoid) [B, H, T]; biases [H, N]; angle
    [B, T, H, A], the sums so far; D [H]."""

    q: Tensor
    k: Tensor
    x: Tensor
    z: Tensor | None
    log_decay: Tensor
    dt: Tensor
    trap: Tensor
    q_bias: Tensor
    k_bias: Tensor
    angle: Tensor
    D: Tensor

    @property
    def chunk(self) -> int:
        return CHUNKS[self.x.element_size()]

    @property
    def chunks(self) -> int:
        return math.ceil(self.x.shape[1] / self.chunk)


class Kept(NamedTuple):
    """For the backward pass. y [B, T, H, P]: before the gate. states [B, H, P, c * N]: before each chunk. sums
    [B, H, T] and ends [B, H, c]: of log decays inside chunks, base 2. q, k [B, T, H, N]: turned, k scaled. pairs,
    scale, gamma [B, H, T]: q.k of a token with itself times gamma; what later tokens, and itself, weigh its key by."""

    y: Tensor
    states: Tensor
    sums: Tensor
    ends: Tensor
    q: Tensor
    k: Tensor
    pairs: Tensor
    scale: Tensor
    gamma: Tensor

    @classmethod
    def of(cls, i: Inputs, *, keep: bool) -> Kept:
        """Tensors to write into; but for `keep`, those that the forward pass reads again itself, and no room else."""
        (B, T, H, P), N, x, wide = i.x.shape, i.q.shape[-1], i.x, i.dt
        turned, per_token = (B, T, H, N), (B, H, T)
        y, states, sums, ends = x.shape, (B, H, P, i.chunks * N), per_token, (B, H, i.chunks)
        if not keep:
            y = states = sums = ends = (0,)
        return cls(
            x.new_empty(y), x.new_empty(states), wide.new_empty(sums), wide.new_empty(ends), x.new_empty(turned),
            x.new_empty(turned), *(wide.new_empty(per_token) for _ in range(3)),
        )


def forward(i: Inputs, state_BHPN: Tensor | None, *, keep: bool, last: bool) -> tuple[Tensor, Tensor | None, Kept]:
    """out [B, T, H, P] in the dtype of x, gated where there is a z; the state after the last token, float32, if `last`;
    what is kept (if `keep`, all of it). The state before the first token has that token's share of the one before it
    in it already."""
    (B, T, H, P), (G, N), new = i.x.shape, i.q.shape[2:], i.dt.new_empty
    kept, out = Kept.of(i, keep=keep), torch.empty_like(i.x)
    check_offsets(x=i.x.numel(), turned=kept.q.numel(), states=kept.states.numel())
    after = new(B, H, P, N) if last else None
    # Keys of the last chunk: the kernel insists.
    keys = new(B, H, i.chunk, N) if last else None
    y, states, sums, ends = (t if keep else None for t in (kept.y, kept.states, kept.sums, kept.ends))
    has_state = state_BHPN is not None
    # The package adds the token before the first one itself, from its key and x.
    k_before, x_before = (i.dt.new_zeros(B, H, n) if has_state else None for n in (N, P))
    _set_allocator(i.x.device)
    launch(
        siso_kernels().forward.mamba3_siso_fwd_kernel, lambda _: (H, B),
        Q=i.q, K=i.k, V=i.x, ADT=i.log_decay, DT=i.dt, Trap=i.trap, Q_bias=i.q_bias, K_bias=i.k_bias, Angles=i.angle,
        D=i.D, Z=i.z, Initial_SSM_State=state_BHPN, Initial_K_State=k_before, Initial_V_State=x_before,
        Cu_Seqlens=None, Out=out, Out_v=y, SSM_States=states, DA_CS_Store=sums, DA_CS_SUM_Store=ends, Q_store=kept.q,
        K_store=kept.k, QK_store=kept.pairs, Scale_store=kept.scale, Gamma_store=kept.gamma, Final_SSM_State=after,
        Final_K_State=keys,
        **_strides(i.q, "q", "batch seqlen head qkdim"), **_strides(i.k, "k", "batch seqlen head qkdim"),
        **_strides(i.x, "v", "batch seqlen head vdim"), **_strides(i.log_decay, "adt", "batch head seqlen"),
        **_strides(i.dt, "dt", "batch head seqlen"), **_strides(i.trap, "trap", "batch head seqlen"),
        **_strides(i.q_bias, "q_bias", "head qkdim"), **_strides(i.k_bias, "k_bias", "head qkdim"),
        **_strides(i.angle, "angles", "batch seqlen head qkdim"), stride_d_head=i.D.stride(0),
        **_strides(i.z, "z", "batch seqlen head vdim"),
        **_strides(state_BHPN, "init_ssm_state", "seq head vdim qkdim"),
        **_strides(k_before, "init_k_state", "seq head qkdim"), **_strides(x_before, "init_v_state", "seq head vdim"),
        stride_cu_seqlen=0,
        **_strides(out, "o", "batch seqlen head vdim"), **_strides(y, "o_v", "batch seqlen head vdim"),
        **_strides(states, "ssm_states", "batch head vdim qkdim"),
        **_strides(sums, "da_cs_store", "batch head seqlen"), **_strides(ends, "da_cs_sum_store", "batch head seqlen"),
        **_strides(kept.q, "q_store", "batch seqlen head qkdim"),
        **_strides(kept.k, "k_store", "batch seqlen head qkdim"),
        **_strides(kept.pairs, "qk_store", "batch head seqlen"),
        **_strides(kept.scale, "scale_store", "batch head seqlen"),
        **_strides(kept.gamma, "gamma_store", "batch head seqlen"),
        **_strides(after, "final_ssm_state", "seq head vdim qkdim"),
        **_strides(keys, "final_k_state", "seq head chunk qkdim"),
        seqlen=T, nheads_qk=G, headdim_qk=N, headdim_v=P, headdim_angles=i.angle.shape[-1], CHUNK_SIZE=i.chunk,
        HEADDIM_QK=N, HEADDIM_V=P, STORE_SSM_STATES_ADT_OUTV=keep, HAS_INITIAL_STATES=has_state,
        RETURN_FINAL_STATES=last, HAS_D=True, HAS_Z=i.z is not None, IS_VARLEN=False,
    )
    return out, after, kept


def backward(
    i: Inputs, kept: Kept, dout: Tensor, dlast_BHPN: Tensor | None, *, has_state: bool
) -> tuple[Inputs, Tensor | None]:
    """Gradients of the inputs (of z: None without one) and of the first state (None without one)."""
    kernels = siso_kernels().backward
    _set_allocator(i.x.device)
    dz, dy = (None, dout) if i.z is None else kernels.compute_dzdo(dout, i.z, kept.y)
    dq, dk, dx, dlog_decay, dpairs, dD, dstate = kernels.compute_dqkv(
        kept.q, kept.k, i.x, kept.sums, kept.ends, kept.pairs, kept.states, dy, d_ossm_state=dlast_BHPN, D=i.D,
        chunk_size=i.chunk, has_input_state=has_state,
    )
    dq, dk, dq_bias, dk_bias, dangle, dscale, dgamma = kernels.compute_dqktheta(
        i.q, i.k, kept.scale, kept.gamma, i.q_bias, i.k_bias, i.angle, dq, dk, dpairs, chunk_size=i.chunk
    )
    ddt, dtrap, *_ = kernels.compute_ddt_dtrap_dinput_states(dscale, dgamma, i.dt, i.trap)
    return Inputs(dq, dk, dx, dz, dlog_decay, ddt, dtrap, dq_bias, dk_bias, dangle, dD), dstate


def _strides(tensor: Tensor | None, name: str, dims: str) -> dict[str, int]:
    return strides(tensor, *(f"{name}_{dim}" for dim in dims.split()))


def _set_allocator(device: torch.device) -> None:
    """Where kernels keep the descriptors of their tensors. Each thread has a setting of its own, autograd's too."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device=device, dtype=torch.int8))
