"""Attention of one new token a row over a cache of fixed size: split over keys, then combined; nothing reads lengths
on the host.

In: qkv_BE = [q | k | v] of the new tokens, the cache's k and v [B, S, Kv, P] (k after rope), used_B (int64: tokens of
each row so far), position_B. Out: y_BQ = [B, H * P]. The new key and value are written into the cache and used_B
counts them, in place. Token t of a row lies in slot t % S; with a window of w tokens, S may be as small as w - 1;
without one, S bounds the row (a longer one overwrites its beginning: the caller's check).

Letters: B batch, S slots, H query heads, Kv key/value heads, P head_dim, R rotated pairs, L splits of a row's keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambadsl.parts.triton.decode.configs import ATTENTION, ATTENTION_PROGRAMS, MOST_SPLITS, Tile, for_batch
from mambadsl.parts.triton.decode.device import begin, launch_options

#: Of a multiprocessor's memory, what the blocks of keys and values on their way may take.
SHARED_BYTES = 160 * 1024


def attend(
    qkv_BE: Tensor, k_BSKP: Tensor, v_BSKP: Tensor, used_B: Tensor, position_B: Tensor, *, scale: float,
    frequency_R: Tensor | None = None, rope_factor: float = 1.0, window: int | None = None,
    softcap: float | None = None, key_multiplier: float = 1.0, q_norm_P: Tensor | None = None,
    k_norm_P: Tensor | None = None, norm_eps: float = 0.0, splits: int | None = None, tile: Tile | None = None,
) -> Tensor:
    """y_BQ in the dtype of qkv. frequency_R: angles per position of the rotated pairs; rope_factor: of their cosines
    and sines. q_norm_P, k_norm_P: weights of per-head RMS norms, before key_multiplier and rope."""
    (B, S, Kv, P), E = k_BSKP.shape, qkv_BE.shape[1]
    H = E // P - 2 * Kv
    if not (k_BSKP.is_contiguous() and v_BSKP.is_contiguous()):
        raise ValueError("the cache's keys and values must be contiguous")
    if window is not None and S < window - 1:
        raise ValueError(f"a window of {window} tokens needs a cache of at least {window - 1} slots, not {S}")
    tile = tile or for_batch(ATTENTION, B)
    keys = max(16, min(tile.rows, triton.next_power_of_2(S)))
    # 16: the least that tensor cores multiply.
    block, heads = max(16, triton.next_power_of_2(P)), max(16, triton.next_power_of_2(H // Kv))
    while keys > 16 and 2 * keys * block * k_BSKP.element_size() * tile.stages > SHARED_BYTES:
        keys //= 2
    L = splits or max(1, min(MOST_SPLITS, ATTENTION_PROGRAMS // (B * Kv), triton.cdiv(S, keys)))
    new = qkv_BE.new_empty
    part, peak, total = (new(shape, dtype=torch.float32) for shape in ((B, H, L, P), (B, H, L), (B, H, L)))
    options = launch_options(qkv_BE)
    _split_kernel[(L, Kv, B)](
        qkv_BE, k_BSKP, v_BSKP, used_B, position_B, frequency_R, q_norm_P, k_norm_P, part, peak, total,
        qkv_BE.stride(0), S, window or 0, scale, softcap or 1.0, key_multiplier, rope_factor, norm_eps,
        H=H, KV=Kv, P=P, R=0 if frequency_R is None else frequency_R.shape[0], L=L, WINDOW=window is not None,
        SOFTCAP=softcap is not None, NORM=q_norm_P is not None, BLOCK=block, HEADS=heads, KEYS=keys,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )
    y_BQ = new((B, H * P))
    _combine_kernel[(H, B)](
        part, peak, total, y_BQ, used_B, H, P=P, L=L, BLOCK=block, SPLITS=triton.next_power_of_2(L),
        num_warps=1 if L <= 8 else 4, **options,
    )
    return y_BQ


@triton.jit
def _head(
    QKV, place, c, mask, position, FREQUENCY, NORM_W, factor, eps, multiplier, P: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr,
):
    """Heads at `place` [heads, 1] + c [1, channels]: normed, scaled and rotated, float32. Channel i turns with its
    partner, i + R or i - R, which is read beside it."""
    x = tl.load(QKV + place + c, mask=mask, other=0.0).to(tl.float32)
    root = 1.0
    if NORM:
        root = tl.sqrt(tl.sum(x * x, 1) / P + eps)[:, None]
        x = x / root * tl.load(NORM_W + c, mask=c < P, other=0.0).to(tl.float32)
    x = x * multiplier
    if R > 0:
        turns = c < 2 * R
        partner = tl.where(c < R, c + R, c - R)
        y = tl.load(QKV + place + partner, mask=mask & turns, other=0.0).to(tl.float32)
        if NORM:
            y = y / root * tl.load(NORM_W + partner, mask=turns, other=0.0).to(tl.float32)
        y = y * multiplier
        angle = position.to(tl.float32) * tl.load(FREQUENCY + c % R, mask=turns, other=0.0)
        turned = (x * tl.cos(angle) + tl.where(c < R, -y, y) * tl.sin(angle)) * factor
        x = tl.where(turns, turned, x)
    return x


@triton.jit
def _split_kernel(
    QKV, K, V, USED, POSITION, FREQUENCY, Q_NORM, K_NORM, PART, PEAK, TOTAL, qkv_stride, S, window, scale, softcap,
    key_multiplier, factor, eps,
    H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, R: tl.constexpr, L: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(0)
    kv = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    begin(PDL)
    used = tl.load(USED + row).to(tl.int32)
    position = tl.load(POSITION + row)
    share: tl.constexpr = H // KV
    r = tl.arange(0, HEADS)
    c = tl.arange(0, BLOCK)
    in_head = (c < P)[None, :]
    qkv = QKV + row * qkv_stride
    q = _head(
        qkv, ((kv * share + r) * P)[:, None], c[None, :], (r < share)[:, None] & in_head, position, FREQUENCY, Q_NORM,
        factor, eps, 1.0, P, R, NORM,
    )
    q_cached = q.to(K.dtype.element_ty)

    # Slots that may hold a visible token, in equal runs of whole blocks, one for each split.
    filled = tl.minimum(used, S)
    latest = (used + S - 1) % S
    first = filled * 0
    if WINDOW:
        first = tl.where(used <= S, tl.maximum(used - window + 1, 0), 0)
    run = tl.cdiv(tl.cdiv(filled - first, L), KEYS) * KEYS
    low = first + split * run
    high = tl.minimum(low + run, filled)

    peak = tl.full((HEADS,), -1e30, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK), tl.float32)
    i = tl.arange(0, KEYS)
    place = i[:, None] * (KV * P) + c[None, :]
    base = (row * S * KV + kv) * P
    for start in range(low, high, KEYS):
        s = start + i
        seen = s < high
        if WINDOW:
            # Tokens between the slot's and the new one.
            age = latest - s + tl.where(s > latest, S, 0)
            seen = seen & (age < window - 1)
        mask = seen[:, None] & in_head
        block = base + tl.cast(start, tl.int64) * (KV * P)
        k = tl.load(K + block + place, mask=mask, other=0.0, eviction_policy="evict_first")
        v = tl.load(V + block + place, mask=mask, other=0.0, eviction_policy="evict_first")
        score = tl.dot(q_cached, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        score = tl.where(seen[None, :], score, -1e30)
        new_peak = tl.maximum(peak, tl.max(score, 1))
        fade = tl.exp(peak - new_peak)
        weight = tl.where(seen[None, :], tl.exp(score - new_peak[:, None]), 0.0)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = new_peak

    if split == 0:
        # The new token: into the cache, and seen by its own query.
        one = tl.zeros((1, 1), tl.int32)
        k_new = _head(
            qkv, (H + kv) * P + one, c[None, :], in_head, position, FREQUENCY, K_NORM, factor, eps, key_multiplier,
            P, R, NORM,
        ).to(K.dtype.element_ty)
        v_new = tl.load(qkv + (H + KV + kv) * P + c[None, :], mask=in_head, other=0.0).to(V.dtype.element_ty)
        slot = base + (used % S).to(tl.int64) * (KV * P) + c[None, :]
        tl.store(K + slot, k_new, mask=in_head)
        tl.store(V + slot, v_new, mask=in_head)
        score = tl.sum(q_cached.to(tl.float32) * k_new.to(tl.float32), 1) * scale
        if SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        new_peak = tl.maximum(peak, score)
        fade = tl.exp(peak - new_peak)
        weight = tl.exp(score - new_peak)
        total = total * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * v_new.to(tl.float32)
        peak = new_peak

    out = (row * H + kv * share + r) * L + split
    tl.store(PEAK + out, peak, mask=r < share)
    tl.store(TOTAL + out, total, mask=r < share)
    tl.store(PART + out[:, None] * P + c[None, :], acc, mask=(r < share)[:, None] & in_head)


@triton.jit
def _combine_kernel(
    PART, PEAK, TOTAL, Y, USED, H, P: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    h = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, SPLITS)
    c = tl.arange(0, BLOCK)
    begin(PDL)
    place = (row * H + h) * L + i
    peak = tl.load(PEAK + place, mask=i < L, other=-1e30)
    total = tl.load(TOTAL + place, mask=i < L, other=0.0)
    part = tl.load(PART + place[:, None] * P + c[None, :], mask=(i < L)[:, None] & (c < P)[None, :], other=0.0)
    weight = tl.exp(peak - tl.max(peak, 0))
    y = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(Y + (row * H + h) * P + c, y.to(Y.dtype.element_ty), mask=c < P)
    if h == 0:
        tl.store(USED + row, tl.load(USED + row) + 1)
