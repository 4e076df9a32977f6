"""Gradients of B and C, which the heads of a group share.

    dC_i = sum over heads of exp(a_i) dy_i . state  +  sum over j of dS_ij B_j
    dB_j = sum over heads of exp(a_last - a_j) dt_j x_j . dstate  +  sum over i of dS_ij C_i

One program adds up what heads of a group give to a tile of tokens. Letters as in `forward.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.ssd.shape import Loop, block, precision, read, same_document, splits, write
from mambadsl.parts.triton.ssd.states import weights

GROUPS = Loop(warps=4, stages=3, programs=2)
#: Tokens of a program.
ROWS = 64


class Parts(NamedTuple):
    """Of a gradient, [B, T, M, G, N] float32: to be added up over M."""

    parts_BTMGN: Tensor
    out_BTGN: Tensor


def groups_backward(
    u_BTHP: Tensor, states_BcHPN: Tensor, w_BTGN: Tensor | None, other_BTGN: Tensor, dscores_BcMGQQ: Tensor,
    decay_BcHQ: Tensor, dt_BcHQ: Tensor | None, segments_BT: Tensor | None, *, out: Tensor, da: Tensor | None = None,
    loop: Loop = GROUPS, rows: int = ROWS,
) -> Parts | None:
    """The gradient of what a group shares, for `out` [B, T, G, N]: with dt that of B (u = x, states = the gradients of
    the states after each chunk, other = C), without that of C (u = dy, states = those before each chunk, w = C, other
    = B). Writes the share of the gradient of a that comes through w into `da`, [B, c, H, Q] float32 contiguous, where
    that is given. Returns the parts that `add_up` is to write into `out`; None where `out` is written already."""
    B, T, H, P = u_BTHP.shape
    G, N = other_BTGN.shape[2:]
    c, given, _, Q = dscores_BcMGQQ.shape[1:5]
    strides_w = (0, 0, 0) if w_BTGN is None else w_BTGN.stride()[:3]
    K = min(rows, Q)
    M = splits(loop, pieces=B * c * G * (Q // K), ratio=H // G, device=u_BTHP.device)
    parts_BTMGN = out[:, :, None] if M == 1 else torch.empty(
        B, T, M, G, N, dtype=torch.float32, device=u_BTHP.device
    )
    NB = min(block(N), 128)
    _groups_backward[(M * G * (Q // K), c, B)](
        u_BTHP, states_BcHPN, w_BTGN, other_BTGN, dscores_BcMGQQ, decay_BcHQ, dt_BcHQ, segments_BT, parts_BTMGN,
        da, T, H, c, H // G, H // G // M, given, G,
        u_BTHP.stride(0), u_BTHP.stride(1), u_BTHP.stride(2), *strides_w,
        other_BTGN.stride(0), other_BTGN.stride(1), other_BTGN.stride(2),
        parts_BTMGN.stride(0), parts_BTMGN.stride(1), parts_BTMGN.stride(2), parts_BTMGN.stride(3),
        Q=Q, K=K, P=P, N=N, PB=block(P), NB=NB, BLOCKS=triton.cdiv(N, NB), TO_END=dt_BcHQ is not None,
        HAS_DA=da is not None, HAS_SEGMENTS=segments_BT is not None,
        WHOLE=T % Q == 0 and block(P) == P and N % NB == 0,
        PRECISION=precision(u_BTHP), **loop.options(u_BTHP.dtype),
    )
    return None if M == 1 else Parts(parts_BTMGN, out)


@triton.jit
def _groups_backward(
    u, states, w, other, dscores, decay, dt, segments, parts, da, T, H, chunks, ratio, heads, given, groups,
    u_b, u_t, u_h, w_b, w_t, w_g, o_b, o_t, o_g, p_b, p_t, p_m, p_g,
    Q: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    BLOCKS: tl.constexpr, TO_END: tl.constexpr, HAS_DA: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Tiles of a chunk side by side: they read the same states.
    tile = tl.program_id(0) % (Q // K)
    g, split = tl.program_id(0) // (Q // K) % groups, tl.program_id(0) // (Q // K) // groups
    first = g * ratio + split * heads
    start = (c * Q).to(tl.int64)
    left = T - c * Q
    chunk = b * chunks + c
    i, p, q = tile * K + tl.arange(0, K), tl.arange(0, PB), tl.arange(0, Q)
    counts = tl.full((K,), 1.0, tl.float32)
    if HAS_SEGMENTS:
        of = tl.minimum(left, Q) - 1 if TO_END else -1
        counts = same_document(segments + b * T + start, i, left, of, TO_END or c > 0)
    u += b * u_b + start * u_t + first * u_h
    if HAS_DA:
        w += b * w_b + start * w_t + g * w_g
    other += b * o_b + start * o_t + g * o_g
    parts += b * p_b + start * p_t + split * p_m + g * p_g
    states += (chunk * H + first) * P * N
    at = (chunk * H + first) * Q
    for step in tl.static_range(0, BLOCKS):
        n = step * NB + tl.arange(0, NB)
        grad_KN = tl.zeros((K, NB), tl.float32)
        # The splits of dS are shared out among the programs that add up the same gradient.
        for m in range(split, given, tl.num_programs(0) // (Q // K) // groups):
            dS = dscores + ((chunk * given + m) * groups + g) * Q * Q
            other_QN = read(other, o_t, q, n, left, N, WHOLE)
            if TO_END:
                dS_KQ = tl.trans(tl.load(dS + q[:, None] * Q + i[None, :]))
            else:
                dS_KQ = tl.load(dS + i[:, None] * Q + q[None, :])
            grad_KN = tl.dot(dS_KQ, other_QN, grad_KN, input_precision=PRECISION)
        if HAS_DA:
            w_KN = read(w, w_t, i, n, left, N, WHOLE).to(tl.float32)
        for k in tl.range(0, heads, num_stages=STAGES):
            u_KP = read(u + k * u_h, u_t, i, p, left, P, WHOLE)
            from_PN = read(states + k * (P * N), N, p, n, P, N, PB == P and N % NB == 0)
            scale = weights(decay, dt, at + k * Q, i, Q, TO_END)
            if HAS_SEGMENTS:
                scale *= counts
            mine_KN = tl.dot(u_KP, from_PN.to(u_KP.dtype), input_precision=PRECISION) * scale[:, None]
            grad_KN += mine_KN
            if HAS_DA:
                share = tl.sum(mine_KN * w_KN, 1)
                if step > 0:
                    share += tl.load(da + at + k * Q + i)
                tl.store(da + at + k * Q + i, share)
        write(parts, p_t, i, n, left, N, grad_KN, WHOLE)


def add_up(*gradients: Parts | None) -> None:
    """Writes what `groups_backward` left in parts."""
    for made in gradients:
        if made is not None:
            _add_up(*made)


def _add_up(parts_BTMGN: Tensor, out_BTGN: Tensor) -> None:
    B, T, M, G, N = parts_BTMGN.shape
    elements = B * T * G * N
    SIZE = 1024
    _add_up_kernel[(triton.cdiv(elements, SIZE),)](
        parts_BTMGN, out_BTGN, elements, T, G * N, G, N,
        out_BTGN.stride(0), out_BTGN.stride(1), out_BTGN.stride(2), M=M, SIZE=SIZE, num_warps=4,
    )


@triton.jit
def _add_up_kernel(parts, out, elements, T, row, G, N, o_b, o_t, o_g, M: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    real = at < elements
    bt, inside = at // row, at % row
    total = tl.zeros((SIZE,), tl.float32)
    for m in tl.static_range(0, M):
        total += tl.load(parts + (bt * M + m) * row + inside, mask=real, other=0)
    to = out + bt // T * o_b + bt % T * o_t + inside // N * o_g + inside % N
    tl.store(to, total.to(out.dtype.element_ty), mask=real)
