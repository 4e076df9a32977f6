"""The chunk scan: scores, decays, inputs and the states before each chunk -> outputs.

    y_i = sum over j <= i of S_ij exp(a_i - a_j) dt_j x_j  +  exp(a_i) C_i . state  +  D x_i

a: running sums of dt * A in the chunk; S: C_i . B_j. One program computes a chunk's scores and walks over heads of
their group, the next ones' inputs and states on their way meanwhile; mamba_ssm's kernel starts anew for each head,
and computes an exponential for each pair of tokens.
Letters: B batch, T time, H heads, P head_dim, N d_state, G groups, c chunks, Q tokens of a chunk, R tiles of a chunk,
K tokens of a tile, M splits of a group's heads.
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

SCAN = Loop(warps=4, stages=2, programs=2)


def scan_forward(
    x_BTHP: Tensor, dt_BcHQ: Tensor, decay_BcHQ: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, states_BcHPN: Tensor,
    D_H: Tensor | None, segments_BT: Tensor | None, *, out: Tensor | None = None, loop: Loop = SCAN,
) -> Tensor:
    """y_BTHP in the dtype of x.

    states: before each chunk. decay: a, float32. segments: int32, from 0 in each row.
    """
    B, T, H, P = x_BTHP.shape
    G, N = C_BTGN.shape[2:]
    c, _, Q = dt_BcHQ.shape[1:]
    R = tiles(Q, loop)
    y_BTHP = torch.empty(B, T, H, P, dtype=x_BTHP.dtype, device=x_BTHP.device) if out is None else out
    M = splits(loop, pieces=B * c * G, ratio=H // G, device=x_BTHP.device)
    _scan_forward[(M * G, c, B)](
        x_BTHP, dt_BcHQ, decay_BcHQ, B_BTGN, C_BTGN, states_BcHPN, D_H, segments_BT, y_BTHP,
        T, H, c, H // G, H // G // M, G,
        x_BTHP.stride(0), x_BTHP.stride(1), x_BTHP.stride(2),
        B_BTGN.stride(0), B_BTGN.stride(1), B_BTGN.stride(2), C_BTGN.stride(0), C_BTGN.stride(1), C_BTGN.stride(2),
        y_BTHP.stride(0), y_BTHP.stride(1), y_BTHP.stride(2),
        Q=Q, R=R, K=Q // R, P=P, N=N, PB=block(P), NB=block(N), HAS_D=D_H is not None,
        HAS_SEGMENTS=segments_BT is not None, WHOLE=T % Q == 0 and block(P) == P and block(N) == N,
        PRECISION=precision(x_BTHP), **loop.options(x_BTHP.dtype, rows=Q // R, state=block(P) * block(N)),
    )
    return y_BTHP


@triton.jit
def _scan_forward(
    x, dt, decay, Bs, C, states, D, segments, y, T, H, chunks, ratio, heads, groups,
    x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, y_b, y_t, y_h,
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
    i, p, n = tl.arange(0, K), tl.arange(0, PB), tl.arange(0, NB)
    C += b * C_b + start * C_t + g * C_g
    Bs += b * B_b + start * B_t + g * B_g
    if HAS_SEGMENTS:
        segments += b * T + start
        starts0 = same_document(segments, i, left, -1, c > 0)
    lower = i[:, None] >= i[None, :]
    B0 = read(Bs, B_t, i, n, left, N, WHOLE)
    C0 = read(C, C_t, i, n, left, N, WHOLE)
    S00 = tl.where(lower, pairs(C0, B0, i, i, left, segments, HAS_SEGMENTS, PRECISION), 0.0)
    if R == 2:
        B1 = read(Bs, B_t, K + i, n, left, N, WHOLE)
        C1 = read(C, C_t, K + i, n, left, N, WHOLE)
        S10 = pairs(C1, B0, K + i, i, left, segments, HAS_SEGMENTS, PRECISION)
        S11 = tl.where(lower, pairs(C1, B1, K + i, K + i, left, segments, HAS_SEGMENTS, PRECISION), 0.0)
        if HAS_SEGMENTS:
            starts1 = same_document(segments, K + i, left, -1, c > 0)
    x += b * x_b + start * x_t + first * x_h
    y += b * y_b + start * y_t + first * y_h
    states += (chunk * H + first) * P * N
    dt += (chunk * H + first) * Q
    decay += (chunk * H + first) * Q
    for k in tl.range(0, heads, num_stages=STAGES):
        state_PN = read(states + k * (P * N), N, p, n, P, N, PB == P and NB == N)
        x0 = read(x + k * x_h, x_t, i, p, left, P, WHOLE)
        a0 = tl.load(decay + k * Q + i) * LOG2E
        dt0 = tl.load(dt + k * Q + i)
        scale = tl.exp2(a0)
        if HAS_SEGMENTS:
            scale *= starts0
        y0 = tl.dot(C0, tl.trans(state_PN).to(C0.dtype), input_precision=PRECISION) * scale[:, None]
        weight = S00 * tl.exp2(tl.minimum(a0[:, None] - a0[None, :], 0.0)) * dt0[None, :]
        y0 = tl.dot(weight.to(x0.dtype), x0, y0, input_precision=PRECISION)
        if HAS_D:
            skip = tl.load(D + first + k).to(tl.float32)
            y0 += skip * x0.to(tl.float32)
        write(y + k * y_h, y_t, i, p, left, P, y0, WHOLE)
        if R == 2:
            x1 = read(x + k * x_h, x_t, K + i, p, left, P, WHOLE)
            a1 = tl.load(decay + k * Q + K + i) * LOG2E
            dt1 = tl.load(dt + k * Q + K + i)
            middle = tl.load(decay + k * Q + K - 1) * LOG2E
            y1 = tl.dot(C1, tl.trans(state_PN).to(C1.dtype), input_precision=PRECISION) * tl.exp2(middle)
            if HAS_SEGMENTS:
                y1 *= starts1[:, None]
            weight = S10 * (tl.exp2(tl.minimum(middle - a0, 0.0)) * dt0)[None, :]
            y1 = tl.dot(weight.to(x0.dtype), x0, y1, input_precision=PRECISION)
            y1 *= tl.exp2(a1 - middle)[:, None]
            weight = S11 * tl.exp2(tl.minimum(a1[:, None] - a1[None, :], 0.0)) * dt1[None, :]
            y1 = tl.dot(weight.to(x1.dtype), x1, y1, input_precision=PRECISION)
            if HAS_D:
                y1 += skip * x1.to(tl.float32)
            write(y + k * y_h, y_t, K + i, p, left, P, y1, WHOLE)
