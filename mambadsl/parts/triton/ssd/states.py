"""The states between chunks: what each adds, how they pass on, and both of that backwards.

    added_c = sum over j of exp(a_last - a_j) dt_j x_j B_j          before_{c+1} = exp(a_last) before_c + added_c
    dbefore_c = sum over i of exp(a_i) dy_i C_i                     dadded_c = dbefore_{c+1} + exp(a_last) dadded_{c+1}

A document that ends inside a chunk ends its state there: only tokens of the chunk's last document are added, and only
those of the document before the chunk read. Letters as in `forward.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.ssd.shape import LOG2E, Loop, block, precision, read, same_document, splits, write

STATES = Loop(warps=8, stages=3, programs=2)


class Pass(NamedTuple):
    """Elements of a state that one program carries from chunk to chunk; warps; chunks on their way."""

    width: int
    warps: int
    stages: int


PASS = Pass(2048, 4, 4)
PASS_BACKWARD = Pass(1024, 2, 4)


def chunk_states(
    u_BTHP: Tensor, v_BTGN: Tensor, decay_BcHQ: Tensor, dt_BcHQ: Tensor | None, segments_BT: Tensor | None, *,
    loop: Loop = STATES,
) -> Tensor:
    """[B, c, H, P, N] in the dtype of u: with dt, what each chunk adds to the state at its end (u = x, v = B);
    without, the gradient of the state before each chunk (u = dy, v = C)."""
    B, T, H, P = u_BTHP.shape
    G, N = v_BTGN.shape[2:]
    c, _, Q = decay_BcHQ.shape[1:]
    states_BcHPN = torch.empty(B, c, H, P, N, dtype=u_BTHP.dtype, device=u_BTHP.device)
    M = splits(loop, pieces=B * c * G, ratio=H // G, device=u_BTHP.device)
    _chunk_states[(M * G, c, B)](
        u_BTHP, v_BTGN, decay_BcHQ, dt_BcHQ, segments_BT, states_BcHPN, T, H, c, H // G, H // G // M, G,
        u_BTHP.stride(0), u_BTHP.stride(1), u_BTHP.stride(2), v_BTGN.stride(0), v_BTGN.stride(1), v_BTGN.stride(2),
        Q=Q, P=P, N=N, PB=block(P), NB=block(N), TO_END=dt_BcHQ is not None, HAS_SEGMENTS=segments_BT is not None,
        WHOLE=T % Q == 0 and block(P) == P and block(N) == N, PRECISION=precision(u_BTHP), **loop.options(u_BTHP.dtype),
    )
    return states_BcHPN


@triton.jit
def _chunk_states(
    u, v, decay, dt, segments, states, T, H, chunks, ratio, heads, groups, u_b, u_t, u_h, v_b, v_t, v_g,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    TO_END: tl.constexpr, HAS_SEGMENTS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    c, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g = tl.program_id(0) % groups
    first = g * ratio + tl.program_id(0) // groups * heads
    start = (c * Q).to(tl.int64)
    left = T - c * Q
    chunk = b * chunks + c
    j, p, n = tl.arange(0, Q), tl.arange(0, PB), tl.arange(0, NB)
    v_QN = read(v + b * v_b + start * v_t + g * v_g, v_t, j, n, left, N, WHOLE)
    counts = tl.full((Q,), 1.0, tl.float32)
    if HAS_SEGMENTS:
        of = tl.minimum(left, Q) - 1 if TO_END else -1
        counts = same_document(segments + b * T + start, j, left, of, TO_END or c > 0)
    u += b * u_b + start * u_t + first * u_h
    states += (chunk * H + first) * P * N
    at = (chunk * H + first) * Q
    for k in tl.range(0, heads, num_stages=STAGES):
        u_QP = read(u + k * u_h, u_t, j, p, left, P, WHOLE)
        scale = weights(decay, dt, at + k * Q, j, Q, TO_END)
        if HAS_SEGMENTS:
            scale *= counts
        u_QP = (u_QP.to(tl.float32) * scale[:, None]).to(v_QN.dtype)
        state_PN = tl.dot(tl.trans(u_QP), v_QN, input_precision=PRECISION)
        write(states + k * (P * N), N, p, n, P, N, state_PN, PB == P and NB == N)


@triton.jit
def weights(decay, dt, row, j, Q: tl.constexpr, TO_END: tl.constexpr):
    """How much of each token reaches the chunk's end, times dt; or how much of the state before the chunk reaches each
    token. [Q] float32"""
    a = tl.load(decay + row + j) * LOG2E
    if TO_END:
        last = tl.load(decay + row + Q - 1) * LOG2E
        scale = tl.exp2(tl.minimum(last - a, 0.0)) * tl.load(dt + row + j)
    else:
        scale = tl.exp2(a)
    return scale


def pass_states(
    added_BcHPN: Tensor, decay_BcHQ: Tensor, first_BHPN: Tensor | None, segments_BT: Tensor | None, *, last: bool,
    how: Pass = PASS,
) -> tuple[Tensor, Tensor | None]:
    """The state before each chunk, written over `added`, and the state after the last one, float32 [B, H, P, N], if
    `last`. first: before the first chunk; zeros where None."""
    B, c, H, P, N = added_BcHPN.shape
    after_BHPN = torch.empty(B, H, P, N, dtype=torch.float32, device=added_BcHPN.device) if last else None
    _pass_states[(triton.cdiv(P * N, how.width), H, B)](
        added_BcHPN, decay_BcHQ, first_BHPN, after_BHPN, segments_BT, _length(segments_BT), H, c, P * N,
        Q=decay_BcHQ.shape[3], HAS_FIRST=first_BHPN is not None, LAST=last, HAS_SEGMENTS=segments_BT is not None,
        W=how.width, STAGES=how.stages, num_warps=how.warps,
    )
    return added_BcHPN, after_BHPN


@triton.jit
def _pass_states(
    states, decay, first, after, segments, T, H, chunks, size,
    Q: tl.constexpr, HAS_FIRST: tl.constexpr, LAST: tl.constexpr, HAS_SEGMENTS: tl.constexpr, W: tl.constexpr,
    STAGES: tl.constexpr,
):
    w, h, b = tl.program_id(0) * W + tl.arange(0, W), tl.program_id(1), tl.program_id(2).to(tl.int64)
    mask = w < size
    state = tl.zeros((W,), tl.float32)
    if HAS_FIRST:
        state = tl.load(first + (b * H + h) * size + w, mask=mask, other=0).to(tl.float32)
    document = 0
    for c in tl.range(0, chunks, num_stages=STAGES):
        at = states + ((b * chunks + c) * H + h) * size + w
        added = tl.load(at, mask=mask, other=0).to(tl.float32)
        tl.store(at, state.to(states.dtype.element_ty), mask=mask)
        kept = tl.exp(tl.load(decay + ((b * chunks + c) * H + h) * Q + Q - 1))
        if HAS_SEGMENTS:
            ends_in = tl.load(segments + b * T + tl.minimum(c * Q + Q, T) - 1)
            kept = tl.where(ends_in == document, kept, 0.0)
            document = ends_in
        state = state * kept + added
    if LAST:
        tl.store(after + (b * H + h) * size + w, state, mask=mask)


def pass_states_backward(
    dbefore_BcHPN: Tensor, before_BcHPN: Tensor, decay_BcHQ: Tensor, dlast_BHPN: Tensor | None,
    segments_BT: Tensor | None, *, first: bool, how: Pass = PASS_BACKWARD,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of what each chunk adds, written over `dbefore`; of the log of each chunk's decay, by blocks of the
    state [B, c, H, blocks] float32; of the first state, float32, if `first`. dlast: of the state after the last."""
    B, c, H, P, N = before_BcHPN.shape
    blocks = triton.cdiv(P * N, how.width)
    made = dict(dtype=torch.float32, device=before_BcHPN.device)
    dtotal_BcHW = torch.empty(B, c, H, blocks, **made)
    dfirst_BHPN = torch.empty(B, H, P, N, **made) if first else None
    _pass_states_backward[(blocks, H, B)](
        dbefore_BcHPN, before_BcHPN, decay_BcHQ, dlast_BHPN, dtotal_BcHW, dfirst_BHPN, segments_BT,
        _length(segments_BT), H, c, P * N, Q=decay_BcHQ.shape[3], HAS_LAST=dlast_BHPN is not None, FIRST=first,
        HAS_SEGMENTS=segments_BT is not None, W=how.width,
        STAGES=how.stages, num_warps=how.warps,
    )
    return dbefore_BcHPN, dtotal_BcHW, dfirst_BHPN


@triton.jit
def _pass_states_backward(
    grads, before, decay, dlast, dtotal, dfirst, segments, T, H, chunks, size,
    Q: tl.constexpr, HAS_LAST: tl.constexpr, FIRST: tl.constexpr, HAS_SEGMENTS: tl.constexpr, W: tl.constexpr,
    STAGES: tl.constexpr,
):
    k, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    w = k * W + tl.arange(0, W)
    mask = w < size
    grad = tl.zeros((W,), tl.float32)
    if HAS_LAST:
        grad = tl.load(dlast + (b * H + h) * size + w, mask=mask, other=0).to(tl.float32)
    for back in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - back
        where = (b * chunks + c) * H + h
        read = tl.load(grads + where * size + w, mask=mask, other=0).to(tl.float32)
        tl.store(grads + where * size + w, grad.to(grads.dtype.element_ty), mask=mask)
        kept = tl.exp(tl.load(decay + where * Q + Q - 1))
        if HAS_SEGMENTS:
            ends_in = tl.load(segments + b * T + tl.minimum(c * Q + Q, T) - 1)
            document = tl.load(segments + b * T + c * Q - 1, mask=c > 0, other=0)
            kept = tl.where(ends_in == document, kept, 0.0)
        grad *= kept
        state = tl.load(before + where * size + w, mask=mask, other=0).to(tl.float32)
        tl.store(dtotal + where * tl.num_programs(0) + k, tl.sum(grad * state, 0))
        grad += read
    if FIRST:
        tl.store(dfirst + (b * H + h) * size + w, grad, mask=mask)


def _length(segments_BT: Tensor | None) -> int:
    return 0 if segments_BT is None else segments_BT.shape[1]
