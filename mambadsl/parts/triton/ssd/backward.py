"""Gradients inside a chunk: of inputs, scores and decays.

    dx_j = dt_j (sum over i >= j of S_ij exp(a_i - a_j) dy_i  +  exp(a_last - a_j) B_j dstate)  +  D dy_j
    dS_ij = sum over heads of (dy_i . x_j) exp(a_i - a_j) dt_j
    da_i = sum over j < i of M_ij - sum over k > i of M_ki,  M = the summand of dS times S

The diagonal of M does not depend on a. Row and column sums come from the same float32 numbers, so that their
difference, summed backwards along the chunk, loses nothing; mamba_ssm computes dy . x twice, for dS and for da.
One program keeps what its heads share and walks over them, as in `forward.py`, whose letters these are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.ssd.shape import (
    LOG2E,
    Loop,
    block,
    pairs,
    precision,
    read,
    same_document,
    splits,
    tiles,
    write,
)

INPUTS = Loop(warps=4, stages=2, programs=2)
SCORES = Loop(warps=4, stages=2, programs=2)


def inputs_backward(
    x_BTHP: Tensor, dt_BcHQ: Tensor, decay_BcHQ: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, dstates_BcHPN: Tensor,
    dy_BTHP: Tensor, D_H: Tensor | None, segments_BT: Tensor | None, *, dx: Tensor, loop: Loop = INPUTS,
) -> tuple[Tensor, Tensor]:
    """Writes dx_BTHP into `dx`. Returns, each [B, c, H, Q] float32: the gradient of dt as a factor of x; and that of
    the decays from each token to the chunk's end, one place late (place 0 is not set). dstates: the gradients of the
    states after each chunk."""
    B, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    c, _, Q = dt_BcHQ.shape[1:]
    R = tiles(Q)
    ddt_BcHQ, after_BcHQ = torch.empty_like(dt_BcHQ), torch.empty_like(dt_BcHQ)
    M = splits(loop, pieces=B * c * G, ratio=H // G, device=x_BTHP.device)
    _inputs_backward[(M * G, c, B)](
        x_BTHP, dt_BcHQ, decay_BcHQ, B_BTGN, C_BTGN, dstates_BcHPN, dy_BTHP, D_H, segments_BT, dx, ddt_BcHQ,
        after_BcHQ, T, H, c, H // G, H // G // M, G,
        x_BTHP.stride(0), x_BTHP.stride(1), x_BTHP.stride(2), B_BTGN.stride(0), B_BTGN.stride(1), B_BTGN.stride(2),
        C_BTGN.stride(0), C_BTGN.stride(1), C_BTGN.stride(2),
        dy_BTHP.stride(0), dy_BTHP.stride(1), dy_BTHP.stride(2), dx.stride(0), dx.stride(1), dx.stride(2),
        Q=Q, R=R, K=Q // R, P=P, N=N, PB=block(P), NB=block(N), HAS_D=D_H is not None,
        HAS_SEGMENTS=segments_BT is not None, WHOLE=T % Q == 0 and block(P) == P and block(N) == N,
        PRECISION=precision(x_BTHP), **loop.options(x_BTHP.dtype),
    )
    return ddt_BcHQ, after_BcHQ


@triton.jit
def _inputs_backward(
    x, dt, decay, Bs, C, dstates, dy, D, segments, dx, ddt, after, T, H, chunks, ratio, heads, groups,
    x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, dy_b, dy_t, dy_h, dx_b, dx_t, dx_h,
    Q: tl.constexpr, R: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, HAS_D: tl.constexpr, HAS_SEGMENTS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = tl.program_id(0) % groups
    first = g * ratio + tl.program_id(0) // groups * heads
    start = (c * Q).to(tl.int64)
    left = T - c * Q
    chunk = b * chunks + c
    j, p, n = tl.arange(0, K), tl.arange(0, PB), tl.arange(0, NB)
    Bs += b * B_b + start * B_t + g * B_g
    C += b * C_b + start * C_t + g * C_g
    if HAS_SEGMENTS:
        segments += b * T + start
        end = tl.minimum(left, Q) - 1
        ends0 = same_document(segments, j, left, end, True)
    # Transposed: rows are the inputs j, columns the outputs i.
    upper = j[:, None] <= j[None, :]
    B0 = read(Bs, B_t, j, n, left, N, WHOLE)
    C0 = read(C, C_t, j, n, left, N, WHOLE)
    S00 = tl.where(upper, pairs(B0, C0, j, j, left, segments, HAS_SEGMENTS, PRECISION), 0.0)
    if R == 2:
        B1 = read(Bs, B_t, K + j, n, left, N, WHOLE)
        C1 = read(C, C_t, K + j, n, left, N, WHOLE)
        S01 = pairs(B0, C1, j, K + j, left, segments, HAS_SEGMENTS, PRECISION)
        S11 = tl.where(upper, pairs(B1, C1, K + j, K + j, left, segments, HAS_SEGMENTS, PRECISION), 0.0)
        if HAS_SEGMENTS:
            ends1 = same_document(segments, K + j, left, end, True)
    x += b * x_b + start * x_t + first * x_h
    dy += b * dy_b + start * dy_t + first * dy_h
    dx += b * dx_b + start * dx_t + first * dx_h
    dstates += (chunk * H + first) * P * N
    at = (chunk * H + first) * Q
    for k in tl.range(0, heads, num_stages=STAGES):
        row = at + k * Q + j
        last = tl.load(decay + at + k * Q + Q - 1) * LOG2E
        if HAS_D:
            skip = tl.load(D + first + k).to(tl.float32)
        dstate_PN = read(dstates + k * (P * N), N, p, n, P, N, PB == P and NB == N)
        grad = tl.dot(B0, tl.trans(dstate_PN).to(B0.dtype), input_precision=PRECISION)
        a0 = tl.load(decay + row) * LOG2E
        to_end = tl.exp2(tl.minimum(last - a0, 0.0))
        if HAS_SEGMENTS:
            to_end *= ends0
        grad *= to_end[:, None]
        dt_K = tl.load(dt + row)
        x_KP = read(x + k * x_h, x_t, j, p, left, P, WHOLE).to(tl.float32)
        tl.store(after + row + 1, tl.sum(grad * x_KP, 1) * dt_K, mask=j < Q - 1)
        if R == 2:
            a1 = tl.load(decay + row + K) * LOG2E
            middle = tl.load(decay + at + k * Q + K - 1) * LOG2E
            dy1 = read(dy + k * dy_h, dy_t, K + j, p, left, P, WHOLE)
            weight = S01 * tl.exp2(tl.minimum(a1 - middle, 0.0))[None, :]
            between = tl.dot(weight.to(dy1.dtype), dy1, input_precision=PRECISION)
            grad += between * tl.exp2(tl.minimum(middle - a0, 0.0))[:, None]
        weight = S00 * tl.exp2(tl.minimum(a0[None, :] - a0[:, None], 0.0))
        dy0 = read(dy + k * dy_h, dy_t, j, p, left, P, WHOLE)
        grad = tl.dot(weight.to(dy0.dtype), dy0, grad, input_precision=PRECISION)
        tl.store(ddt + row, tl.sum(grad * x_KP, 1))
        grad *= dt_K[:, None]
        if HAS_D:
            grad += skip * dy0.to(tl.float32)
        write(dx + k * dx_h, dx_t, j, p, left, P, grad, WHOLE)
        if R == 2:
            grad = tl.dot(B1, tl.trans(dstate_PN).to(B1.dtype), input_precision=PRECISION)
            to_end = tl.exp2(tl.minimum(last - a1, 0.0))
            if HAS_SEGMENTS:
                to_end *= ends1
            grad *= to_end[:, None]
            dt_K = tl.load(dt + row + K)
            x_KP = read(x + k * x_h, x_t, K + j, p, left, P, WHOLE).to(tl.float32)
            tl.store(after + row + K + 1, tl.sum(grad * x_KP, 1) * dt_K, mask=j < K - 1)
            weight = S11 * tl.exp2(tl.minimum(a1[None, :] - a1[:, None], 0.0))
            grad = tl.dot(weight.to(dy1.dtype), dy1, grad, input_precision=PRECISION)
            tl.store(ddt + row + K, tl.sum(grad * x_KP, 1))
            grad *= dt_K[:, None]
            if HAS_D:
                grad += skip * dy1.to(tl.float32)
            write(dx + k * dx_h, dx_t, K + j, p, left, P, grad, WHOLE)


def scores_backward(
    x_BTHP: Tensor, dt_BcHQ: Tensor, decay_BcHQ: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, dy_BTHP: Tensor,
    segments_BT: Tensor | None, *, da: Tensor, has_D: bool = True, loop: Loop = SCORES,
) -> tuple[Tensor, Tensor | None]:
    """dS by splits of the heads, [B, c, M, G, Q, Q] in the dtype of x, 0 above the diagonal and between documents; and
    D's gradient by chunks, [B, c, H] float32, if `has_D`: its terms dy_i . x_i are on the diagonal here. Writes the
    scores' share of the gradient of a into `da`, [B, c, H, Q] float32, contiguous."""
    B, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    c, _, Q = dt_BcHQ.shape[1:]
    R = tiles(Q)
    M = splits(loop, pieces=B * c * G, ratio=H // G, device=x_BTHP.device)
    dscores_BcMGQQ = torch.empty(B, c, M, G, Q, Q, dtype=x_BTHP.dtype, device=x_BTHP.device)
    dD_BcH = torch.empty(B, c, H, dtype=torch.float32, device=x_BTHP.device) if has_D else None
    _scores_backward[(M * G, c, B)](
        x_BTHP, dt_BcHQ, decay_BcHQ, B_BTGN, C_BTGN, dy_BTHP, segments_BT, dscores_BcMGQQ, da, dD_BcH,
        T, H, c, H // G, H // G // M, M, G,
        x_BTHP.stride(0), x_BTHP.stride(1), x_BTHP.stride(2), B_BTGN.stride(0), B_BTGN.stride(1), B_BTGN.stride(2),
        C_BTGN.stride(0), C_BTGN.stride(1), C_BTGN.stride(2), dy_BTHP.stride(0), dy_BTHP.stride(1), dy_BTHP.stride(2),
        Q=Q, R=R, K=Q // R, P=P, N=N, PB=block(P), NB=block(N), HAS_D=has_D,
        HAS_SEGMENTS=segments_BT is not None,
        WHOLE=T % Q == 0 and block(P) == P and block(N) == N, PRECISION=precision(x_BTHP), **loop.options(x_BTHP.dtype),
    )
    return dscores_BcMGQQ, dD_BcH


@triton.jit
def _scores_backward(
    x, dt, decay, Bs, C, dy, segments, dscores, da, dD, T, H, chunks, ratio, heads, splits, groups,
    x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, dy_b, dy_t, dy_h,
    Q: tl.constexpr, R: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, HAS_D: tl.constexpr, HAS_SEGMENTS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, split = tl.program_id(0) % groups, tl.program_id(0) // groups
    first = g * ratio + split * heads
    start = (c * Q).to(tl.int64)
    left = T - c * Q
    chunk = b * chunks + c
    i, p, n = tl.arange(0, K), tl.arange(0, PB), tl.arange(0, NB)
    dscores += ((chunk * splits + split) * groups + g) * Q * Q
    below = i[:, None] > i[None, :]
    same = i[:, None] == i[None, :]
    Bs += b * B_b + start * B_t + g * B_g
    C += b * C_b + start * C_t + g * C_g
    if HAS_SEGMENTS:
        segments += b * T + start
    B0 = read(Bs, B_t, i, n, left, N, WHOLE)
    S00 = pairs(read(C, C_t, i, n, left, N, WHOLE), B0, i, i, left, segments, HAS_SEGMENTS, PRECISION)
    S00 = tl.where(below, S00, 0.0)
    total00 = tl.zeros((K, K), tl.float32)
    if R == 2:
        B1 = read(Bs, B_t, K + i, n, left, N, WHOLE)
        C1 = read(C, C_t, K + i, n, left, N, WHOLE)
        S10 = pairs(C1, B0, K + i, i, left, segments, HAS_SEGMENTS, PRECISION)
        S11 = pairs(C1, B1, K + i, K + i, left, segments, HAS_SEGMENTS, PRECISION)
        S11 = tl.where(below, S11, 0.0)
        total10 = tl.zeros((K, K), tl.float32)
        total11 = tl.zeros((K, K), tl.float32)
    x += b * x_b + start * x_t + first * x_h
    dy += b * dy_b + start * dy_t + first * dy_h
    at = (chunk * H + first) * Q
    for k in tl.range(0, heads, num_stages=STAGES):
        row = at + k * Q + i
        x0 = read(x + k * x_h, x_t, i, p, left, P, WHOLE)
        dy0 = read(dy + k * dy_h, dy_t, i, p, left, P, WHOLE)
        a0 = tl.load(decay + row) * LOG2E
        dt0 = tl.load(dt + row)
        grad = tl.dot(dy0, tl.trans(x0), input_precision=PRECISION)
        if HAS_D:
            skipped = tl.sum(tl.where(same, grad, 0.0), 1)
        grad *= tl.exp2(tl.minimum(a0[:, None] - a0[None, :], 0.0)) * dt0[None, :]
        total00 += grad
        moved = grad * S00
        rows = tl.sum(moved, 1)
        if R == 2:
            x1 = read(x + k * x_h, x_t, K + i, p, left, P, WHOLE)
            dy1 = read(dy + k * dy_h, dy_t, K + i, p, left, P, WHOLE)
            a1 = tl.load(decay + row + K) * LOG2E
            dt1 = tl.load(dt + row + K)
            middle = tl.load(decay + at + k * Q + K - 1) * LOG2E
            grad = tl.dot(dy1, tl.trans(x0), input_precision=PRECISION)
            grad *= tl.exp2(tl.minimum(a1 - middle, 0.0))[:, None]
            grad *= (tl.exp2(tl.minimum(middle - a0, 0.0)) * dt0)[None, :]
            total10 += grad
            grad *= S10
            moved += grad
            rows1 = tl.sum(grad, 1)
        tl.store(da + row, rows - tl.sum(moved, 0))
        if R == 2:
            grad = tl.dot(dy1, tl.trans(x1), input_precision=PRECISION)
            if HAS_D:
                skipped += tl.sum(tl.where(same, grad, 0.0), 1)
            grad *= tl.exp2(tl.minimum(a1[:, None] - a1[None, :], 0.0)) * dt1[None, :]
            total11 += grad
            grad *= S11
            tl.store(da + row + K, rows1 + tl.sum(grad, 1) - tl.sum(grad, 0))
        if HAS_D:
            tl.store(dD + chunk * H + first + k, tl.sum(skipped, 0))
    sees = i[:, None] >= i[None, :]
    if HAS_SEGMENTS:
        mine0 = tl.load(segments + i, mask=i < left, other=-1)
        sees0 = sees & (mine0[:, None] == mine0[None, :])
    else:
        sees0 = sees
    write(dscores, Q, i, i, Q, Q, tl.where(sees0, total00, 0.0), True)
    if R == 2:
        if HAS_SEGMENTS:
            mine1 = tl.load(segments + K + i, mask=K + i < left, other=-1)
            total10 = tl.where(mine1[:, None] == mine0[None, :], total10, 0.0)
            sees = sees & (mine1[:, None] == mine1[None, :])
        write(dscores, Q, K + i, i, Q, Q, total10, True)
        write(dscores, Q, i, K + i, Q, Q, tl.zeros((K, K), tl.float32), True)
        write(dscores, Q, K + i, K + i, Q, Q, tl.where(sees, total11, 0.0), True)
