"""Gradients inside a chunk: of inputs, scores and decays.

    dx_j = dt_j (sum over i >= j of S_ij exp(a_i - a_j) dy_i  +  exp(a_last - a_j) B_j dstate)  +  D dy_j
    dS_ij = sum over heads of (dy_i . x_j) exp(a_i - a_j) dt_j
    da_i = sum over j < i of M_ij - sum over k > i of M_ki,  M = the summand of dS times S

The diagonal of M does not depend on a. Row and column sums come from the same float32 numbers, so that their
difference, summed backwards along the chunk, loses nothing; mamba_ssm computes dy . x twice, for dS and for da.
One program keeps what its heads share and walks over them, as in `forward.py`, whose letters these are. The tiles of
a chunk are programs side by side, of inputs and of columns: what both keep would not fit in one's registers, and what
both read the second finds in the L2 cache.
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

INPUTS = Loop(warps=8, stages=3, programs=1, cut=False)
SCORES = Loop(warps=4, stages=3, programs=2)


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
    R = tiles(Q, loop)
    ddt_BcHQ, after_BcHQ = torch.empty_like(dt_BcHQ), torch.empty_like(dt_BcHQ)
    M = splits(loop, pieces=B * c * G * R, ratio=H // G, device=x_BTHP.device)
    _inputs_backward[(M * G * R, c, B)](
        x_BTHP, dt_BcHQ, decay_BcHQ, B_BTGN, C_BTGN, dstates_BcHPN, dy_BTHP, D_H, segments_BT, dx, ddt_BcHQ,
        after_BcHQ, T, H, c, H // G, H // G // M, G,
        x_BTHP.stride(0), x_BTHP.stride(1), x_BTHP.stride(2), B_BTGN.stride(0), B_BTGN.stride(1), B_BTGN.stride(2),
        C_BTGN.stride(0), C_BTGN.stride(1), C_BTGN.stride(2),
        dy_BTHP.stride(0), dy_BTHP.stride(1), dy_BTHP.stride(2), dx.stride(0), dx.stride(1), dx.stride(2),
        Q=Q, R=R, K=Q // R, P=P, N=N, PB=block(P), NB=block(N), HAS_D=D_H is not None,
        HAS_SEGMENTS=segments_BT is not None, WHOLE=T % Q == 0 and block(P) == P and block(N) == N,
        PRECISION=precision(x_BTHP), **loop.options(x_BTHP.dtype, rows=Q // R, state=block(P) * block(N)),
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
    tile, g = tl.program_id(0) % R, tl.program_id(0) // R % groups
    first = g * ratio + tl.program_id(0) // R // groups * heads
    start = (c * Q).to(tl.int64)
    at = ((b * chunks + c) * H + first) * Q
    x += b * x_b + start * x_t + first * x_h
    dy += b * dy_b + start * dy_t + first * dy_h
    dx += b * dx_b + start * dx_t + first * dx_h
    Bs += b * B_b + start * B_t + g * B_g
    C += b * C_b + start * C_t + g * C_g
    dstates += ((b * chunks + c) * H + first) * P * N
    if HAS_D:
        D += first
    if HAS_SEGMENTS:
        segments += b * T + start
    if tile == 0:
        _inputs_of_tile(
            x, dt + at, decay + at, Bs, C, dstates, dy, D, segments, dx, ddt + at, after + at, T - c * Q, heads,
            x_t, x_h, B_t, C_t, dy_t, dy_h, dx_t, dx_h, Q, K, 0, R == 2, P, N, PB, NB, HAS_D, HAS_SEGMENTS, WHOLE,
            PRECISION, STAGES,
        )
    if R == 2:
        if tile == 1:
            _inputs_of_tile(
                x, dt + at, decay + at, Bs, C, dstates, dy, D, segments, dx, ddt + at, after + at, T - c * Q, heads,
                x_t, x_h, B_t, C_t, dy_t, dy_h, dx_t, dx_h, Q, K, K, False, P, N, PB, NB, HAS_D, HAS_SEGMENTS, WHOLE,
                PRECISION, STAGES,
            )


@triton.jit
def _inputs_of_tile(
    x, dt, decay, Bs, C, dstates, dy, D, segments, dx, ddt, after, left, heads,
    x_t, x_h, B_t, C_t, dy_t, dy_h, dx_t, dx_h,
    Q: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, LATER: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, HAS_D: tl.constexpr, HAS_SEGMENTS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Of the K inputs from FIRST on. LATER: the outputs of another tile read them too. Pointers: at the chunk's first
    token (and head, group)."""
    p, n = tl.arange(0, PB), tl.arange(0, NB)
    j = FIRST + tl.arange(0, K)
    # Transposed: rows are the inputs j, columns the outputs i.
    B_KN = read(Bs, B_t, j, n, left, N, WHOLE)
    S = pairs(B_KN, read(C, C_t, j, n, left, N, WHOLE), j, j, left, segments, HAS_SEGMENTS, PRECISION)
    S = tl.where(j[:, None] <= j[None, :], S, 0.0)
    if LATER:
        later = K + tl.arange(0, K)
        S_later = pairs(
            B_KN, read(C, C_t, later, n, left, N, WHOLE), j, later, left, segments, HAS_SEGMENTS, PRECISION
        )
    if HAS_SEGMENTS:
        ends = same_document(segments, j, left, tl.minimum(left, Q) - 1, True)
    for k in tl.range(0, heads, num_stages=STAGES):
        a_K = tl.load(decay + k * Q + j) * LOG2E
        last = tl.load(decay + k * Q + Q - 1) * LOG2E
        to_end = tl.exp2(tl.minimum(last - a_K, 0.0))
        if HAS_SEGMENTS:
            to_end *= ends
        dstate_PN = read(dstates + k * (P * N), N, p, n, P, N, PB == P and NB == N)
        grad = tl.dot(B_KN, tl.trans(dstate_PN).to(B_KN.dtype), input_precision=PRECISION)
        grad *= to_end[:, None]
        x_KP = read(x + k * x_h, x_t, j, p, left, P, WHOLE).to(tl.float32)
        dt_K = tl.load(dt + k * Q + j)
        tl.store(after + k * Q + j + 1, tl.sum(grad * x_KP, 1) * dt_K, mask=j < Q - 1)
        if LATER:
            a_later = tl.load(decay + k * Q + later) * LOG2E
            middle = tl.load(decay + k * Q + K - 1) * LOG2E
            dy_later = read(dy + k * dy_h, dy_t, later, p, left, P, WHOLE)
            weight = S_later * tl.exp2(tl.minimum(a_later - middle, 0.0))[None, :]
            between = tl.dot(weight.to(dy_later.dtype), dy_later, input_precision=PRECISION)
            grad += between * tl.exp2(tl.minimum(middle - a_K, 0.0))[:, None]
        weight = S * tl.exp2(tl.minimum(a_K[None, :] - a_K[:, None], 0.0))
        dy_KP = read(dy + k * dy_h, dy_t, j, p, left, P, WHOLE)
        grad = tl.dot(weight.to(dy_KP.dtype), dy_KP, grad, input_precision=PRECISION)
        tl.store(ddt + k * Q + j, tl.sum(grad * x_KP, 1))
        grad *= dt_K[:, None]
        if HAS_D:
            grad += tl.load(D + k).to(tl.float32) * dy_KP.to(tl.float32)
        write(dx + k * dx_h, dx_t, j, p, left, P, grad, WHOLE)


def scores_backward(
    x_BTHP: Tensor, dt_BcHQ: Tensor, decay_BcHQ: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, dy_BTHP: Tensor,
    segments_BT: Tensor | None, *, da: Tensor, has_D: bool = True, loop: Loop = SCORES,
) -> tuple[Tensor, Tensor | None]:
    """dS by splits of the heads, [B, c, M, G, Q, Q] in the dtype of x, 0 above the diagonal and between documents; and
    D's gradient by tiles and chunks, [R, B, c, H] float32, if `has_D`: its terms dy_i . x_i are on the diagonal here.
    Writes the scores' share of the gradient of a into `da`, [R, B, c, H, Q] float32, contiguous: to be added up over
    R, the tiles of a chunk that `tiles(Q, loop)` counts."""
    B, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    c, _, Q = dt_BcHQ.shape[1:]
    R = tiles(Q, loop)
    if da.shape != (R, B, c, H, Q):
        raise ValueError(f"da must be {[R, B, c, H, Q]}, not {list(da.shape)}")
    M = splits(loop, pieces=B * c * G * R, ratio=H // G, device=x_BTHP.device)
    dscores_BcMGQQ = torch.empty(B, c, M, G, Q, Q, dtype=x_BTHP.dtype, device=x_BTHP.device)
    dD_RBcH = torch.empty(R, B, c, H, dtype=torch.float32, device=x_BTHP.device) if has_D else None
    _scores_backward[(M * G * R, c, B)](
        x_BTHP, dt_BcHQ, decay_BcHQ, B_BTGN, C_BTGN, dy_BTHP, segments_BT, dscores_BcMGQQ, da, dD_RBcH,
        T, H, c, H // G, H // G // M, M, G,
        x_BTHP.stride(0), x_BTHP.stride(1), x_BTHP.stride(2), B_BTGN.stride(0), B_BTGN.stride(1), B_BTGN.stride(2),
        C_BTGN.stride(0), C_BTGN.stride(1), C_BTGN.stride(2), dy_BTHP.stride(0), dy_BTHP.stride(1), dy_BTHP.stride(2),
        Q=Q, R=R, K=Q // R, P=P, N=N, PB=block(P), NB=block(N), HAS_D=has_D,
        HAS_SEGMENTS=segments_BT is not None,
        WHOLE=T % Q == 0 and block(P) == P and block(N) == N, PRECISION=precision(x_BTHP), **loop.options(x_BTHP.dtype),
    )
    return dscores_BcMGQQ, dD_RBcH


@triton.jit
def _scores_backward(
    x, dt, decay, Bs, C, dy, segments, dscores, da, dD, T, H, chunks, ratio, heads, splits, groups,
    x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, dy_b, dy_t, dy_h,
    Q: tl.constexpr, R: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr, HAS_D: tl.constexpr, HAS_SEGMENTS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile, g, split = tl.program_id(0) % R, tl.program_id(0) // R % groups, tl.program_id(0) // R // groups
    first = g * ratio + split * heads
    start = (c * Q).to(tl.int64)
    chunk = b * chunks + c
    at = (chunk * H + first) * Q
    x += b * x_b + start * x_t + first * x_h
    dy += b * dy_b + start * dy_t + first * dy_h
    Bs += b * B_b + start * B_t + g * B_g
    C += b * C_b + start * C_t + g * C_g
    dscores += ((chunk * splits + split) * groups + g) * Q * Q
    da += tile * tl.num_programs(2).to(tl.int64) * chunks * H * Q + at
    if HAS_D:
        dD += (tile * tl.num_programs(2) * chunks + chunk) * H + first
    if HAS_SEGMENTS:
        segments += b * T + start
    if tile == 0:
        _scores_of_tile(
            x, dt + at, decay + at, Bs, C, dy, segments, dscores, da, dD, T - c * Q, heads, x_t, x_h, B_t, C_t, dy_t,
            dy_h, Q, K, 0, R == 2, P, N, PB, NB, HAS_D, HAS_SEGMENTS, WHOLE, PRECISION, STAGES,
        )
    if R == 2:
        if tile == 1:
            _scores_of_tile(
                x, dt + at, decay + at, Bs, C, dy, segments, dscores, da, dD, T - c * Q, heads, x_t, x_h, B_t, C_t,
                dy_t, dy_h, Q, K, K, False, P, N, PB, NB, HAS_D, HAS_SEGMENTS, WHOLE, PRECISION, STAGES,
            )


@triton.jit
def _scores_of_tile(
    x, dt, decay, Bs, C, dy, segments, dscores, da, dD, left, heads, x_t, x_h, B_t, C_t, dy_t, dy_h,
    Q: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, LATER: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, HAS_D: tl.constexpr, HAS_SEGMENTS: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """The K columns from FIRST on, as `_inputs_of_tile`."""
    p, n = tl.arange(0, PB), tl.arange(0, NB)
    j = FIRST + tl.arange(0, K)
    same = j[:, None] == j[None, :]
    B_KN = read(Bs, B_t, j, n, left, N, WHOLE)
    S = pairs(read(C, C_t, j, n, left, N, WHOLE), B_KN, j, j, left, segments, HAS_SEGMENTS, PRECISION)
    S = tl.where(j[:, None] > j[None, :], S, 0.0)
    total = tl.zeros((K, K), tl.float32)
    if LATER:
        i = K + tl.arange(0, K)
        S_later = pairs(read(C, C_t, i, n, left, N, WHOLE), B_KN, i, j, left, segments, HAS_SEGMENTS, PRECISION)
        total_later = tl.zeros((K, K), tl.float32)
    for k in tl.range(0, heads, num_stages=STAGES):
        x_KP = read(x + k * x_h, x_t, j, p, left, P, WHOLE)
        dy_KP = read(dy + k * dy_h, dy_t, j, p, left, P, WHOLE)
        a_K = tl.load(decay + k * Q + j) * LOG2E
        dt_K = tl.load(dt + k * Q + j)
        grad = tl.dot(dy_KP, tl.trans(x_KP), input_precision=PRECISION)
        if HAS_D:
            tl.store(dD + k, tl.sum(tl.sum(tl.where(same, grad, 0.0), 1), 0))
        grad *= tl.exp2(tl.minimum(a_K[:, None] - a_K[None, :], 0.0)) * dt_K[None, :]
        total += grad
        moved = grad * S
        rows = tl.sum(moved, 1)
        if LATER:
            dy_later = read(dy + k * dy_h, dy_t, i, p, left, P, WHOLE)
            a_later = tl.load(decay + k * Q + i) * LOG2E
            middle = tl.load(decay + k * Q + K - 1) * LOG2E
            grad = tl.dot(dy_later, tl.trans(x_KP), input_precision=PRECISION)
            grad *= tl.exp2(tl.minimum(a_later - middle, 0.0))[:, None]
            grad *= (tl.exp2(tl.minimum(middle - a_K, 0.0)) * dt_K)[None, :]
            total_later += grad
            grad *= S_later
            moved += grad
            tl.store(da + k * Q + i, tl.sum(grad, 1))
        tl.store(da + k * Q + j, rows - tl.sum(moved, 0))
        if FIRST > 0:
            tl.store(da + k * Q + j - FIRST, tl.zeros((K,), tl.float32))
    sees = j[:, None] >= j[None, :]
    if HAS_SEGMENTS:
        mine = tl.load(segments + j, mask=j < left, other=-1)
        sees = sees & (mine[:, None] == mine[None, :])
    write(dscores, Q, j, j, Q, Q, tl.where(sees, total, 0.0), True)
    if LATER:
        if HAS_SEGMENTS:
            theirs = tl.load(segments + i, mask=i < left, other=-1)
            total_later = tl.where(theirs[:, None] == mine[None, :], total_later, 0.0)
        write(dscores, Q, i, j, Q, Q, total_later, True)
    if FIRST > 0:
        write(dscores, Q, j - FIRST, j, Q, Q, tl.zeros((K, K), tl.float32), True)
