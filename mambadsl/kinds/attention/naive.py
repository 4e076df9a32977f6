"""Causal attention by definition: one query, one head, one key at a time; frequencies one by one.

Letters: B batch, T time, D d_model, H query heads, K key/value heads, P head_dim. The state is, for
each row, the list of its tokens so far: (document, position, k_KP, v_KP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.attention.kind import gate_dim, kv_dim, q_dim, rotary_dim
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import PADDING, Tokens
from mambadsl.kinds.values import Values, Variant

State = list[list[tuple[int, int, Tensor, Tensor]]]


def frequency(rope: Variant, dim: int, pair: int, length: int) -> float:
    """Radians that one pair of channels turns per token, in a document of `length` tokens."""
    s, theta = rope.scaling, rope.theta
    if rope.name == "proportional" and pair >= int(rope.fraction * dim // 2):
        return 0.0
    if s.name == "dynamic" and length > s.original_context and dim > 2:
        theta *= (s.factor * length / s.original_context - (s.factor - 1)) ** (dim / (dim - 2))
    plain = theta ** (-2 * pair / dim)
    wavelength = 2 * math.pi / plain
    if s.name == "linear":
        return plain / s.factor
    if s.name == "llama3":
        if wavelength < s.original_context / s.high_freq_factor:
            return plain
        if wavelength > s.original_context / s.low_freq_factor:
            return plain / s.factor
        span = s.high_freq_factor - s.low_freq_factor
        smooth = (s.original_context / wavelength - s.low_freq_factor) / span
        return (1 - smooth) * plain / s.factor + smooth * plain
    if s.name == "yarn":
        edges = [
            dim * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (s.beta_fast, s.beta_slow)
        ]
        low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), dim - 1)
        if low == high:
            high += 0.001
        ramp = min(max((pair - low) / (high - low), 0), 1)
        return plain / s.factor * ramp + plain * (1 - ramp)
    return plain


def turn(x_P: Tensor, rope: Variant, dim: int, position: int, length: int) -> Tensor:
    """One head's vector, rotated by its position."""
    out, s = list(x_P), rope.scaling
    scale = 1.0
    if s.name == "yarn":
        auto = 0.1 * math.log(s.factor) + 1 if s.factor > 1 else 1.0
        scale = auto if s.attention_factor is None else s.attention_factor
    for i in range(dim // 2):
        angle = position * frequency(rope, dim, i, length)
        a, b = x_P[i], x_P[i + dim // 2]
        out[i] = (a * math.cos(angle) - b * math.sin(angle)) * scale
        out[i + dim // 2] = (b * math.cos(angle) + a * math.sin(angle)) * scale
    return torch.stack(out)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum() / x.numel() + eps) * weight


def naive(
    weights: Mapping[str, Tensor],
    f: Values,
    dims: Dims,
    x_BTD: Tensor,
    tokens: Tokens,
    state: State | None = None,
    *,
    kv: Tensor | None = None,
) -> tuple[Tensor, State]:
    """kv: [B, T, 2, K, P], the keys and values of another layer, where those are taken. Padding gives zeros."""
    B, T, _ = x_BTD.shape
    positions = tokens.positions_BT.tolist()
    segments = [[0] * T] * B if tokens.segments_BT is None else tokens.segments_BT.tolist()
    rows: State = [[] for _ in range(B)] if state is None else [list(row) for row in state]
    y = [[x_BTD.new_zeros(dims.d_model)] * T for _ in range(B)]
    sinks = weights["sinks"] if f.sinks else [None] * f.heads

    for b in range(B):
        for t in range(T):
            document, position = segments[b][t], positions[b][t]
            if document == PADDING:
                continue
            length = 1 + max(p for p, s in zip(positions[b], segments[b]) if s == document)
            taken = None if kv is None else kv[b, t]
            q_HP, k_KP, v_KP, gate = project(weights, f, x_BTD[b, t], position, length, taken)
            rows[b].append((document, position, k_KP, v_KP))
            seen = [
                (k, v)
                for (s, p, k, v) in rows[b]
                if s == document and p <= position and (f.window is None or p > position - f.window or p < f.keep)
            ]
            heads = [one_head(q_HP[h], seen, h * f.kv_heads // f.heads, f, sinks[h]) for h in range(f.heads)]
            if f.differential.name == "halves":
                heads = difference(weights, f, q_HP, seen, sinks)
            if f.out_gate == "per_head":
                heads = [head_P * torch.sigmoid(gate[h]) for h, head_P in enumerate(heads)]
            y_I = torch.cat(heads)
            if f.out_gate == "elementwise":
                y_I = y_I * torch.sigmoid(gate)
            y_D = weights["o_proj.weight"] @ y_I
            y[b][t] = y_D + weights["o_proj.bias"] if f.o_bias else y_D
    return torch.stack([torch.stack(row) for row in y]), rows


def project(
    weights: Mapping[str, Tensor], f: Values, x_D: Tensor, position: int, length: int, taken: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Queries of each head, keys and values [K, P] of one token, and the gate (empty without one). taken: keys and
    values that come from elsewhere."""
    qkv = weights["qkv_proj.weight"] @ x_D
    if f.qkv_bias:
        qkv = qkv + weights["qkv_proj.bias"]
    if taken is None:
        q, k, v, gate = qkv.split((q_dim(f), kv_dim(f), kv_dim(f), gate_dim(f)))
        k_KP = ready(weights, f, k, "k", position, length)
        v_KP = list(v.split(f.head_dim))
    else:
        q, gate = qkv.split((q_dim(f), gate_dim(f)))
        k_KP, v_KP = list(taken[0]), list(taken[1])
    return ready(weights, f, q, "q", position, length), torch.stack(k_KP), torch.stack(v_KP), gate


def ready(
    weights: Mapping[str, Tensor], f: Values, h: Tensor, name: str, position: int, length: int
) -> list[Tensor]:
    """Queries ("q") or keys ("k") of one token, head by head: normed, scaled, turned."""
    scale = weights[f"{name}_norm.weight"] + f.qk_norm.zero_centered if f.qk_norm.name != "none" else None
    if f.qk_norm.name == "full_width":
        h = rms(h, scale, f.qk_norm.eps)
    heads = list(h.split(f.head_dim))
    if f.qk_norm.name == "per_head":
        heads = [rms(one, scale, f.qk_norm.eps) for one in heads]
    if name == "k":
        heads = [one * f.key_multiplier for one in heads]
    if f.rope.name != "none":
        heads = [turn(one, f.rope, rotary_dim(f), position, length) for one in heads]
    return heads


def one_head(
    q_P: Tensor, seen: list[tuple[Tensor, Tensor]], kv_head: int, f: Values, sink: Tensor | None,
    value_head: int | None = None,
) -> Tensor:
    scale = f.head_dim**-0.5 if f.scale is None else f.scale
    scores = [(q_P * k_KP[kv_head]).sum() * scale for k_KP, _ in seen]
    if f.softcap is not None:
        scores = [f.softcap * torch.tanh(score / f.softcap) for score in scores]
    ends = [] if sink is None else [sink]
    largest = max(float(score.detach()) for score in (*scores, *ends))
    powers = [torch.exp(score - largest) for score in scores]
    total = sum([*powers, *(torch.exp(end - largest) for end in ends)])
    head = kv_head if value_head is None else value_head
    return sum(power / total * v_KP[head] for power, (_, v_KP) in zip(powers, seen))


def difference(
    weights: Mapping[str, Tensor], f: Values, q_HP: list[Tensor], seen: list[tuple[Tensor, Tensor]], sinks: Any
) -> list[Tensor]:
    """Heads of differential attention: softmax of the first half less lambda times that of the second, on the values
    of both halves."""
    q1, k1, q2, k2 = weights["lambda"]
    start = weights["lambda_start"][0]
    share = torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + start
    half, kv_half = f.heads // 2, f.kv_heads // 2
    heads = []
    for h in range(half):
        first, second = h * f.kv_heads // f.heads, (h + half) * f.kv_heads // f.heads
        parts = []
        for values in first, first + kv_half:
            a = one_head(q_HP[h], seen, first, f, sinks[h], values)
            b = one_head(q_HP[h + half], seen, second, f, sinks[h + half], values)
            parts.append(a - share * b)
        scale = weights["sub_norm.weight"] if f.differential.weight else 1
        wide = rms(torch.cat(parts), scale, f.differential.eps) * (1 - start)
        heads += list(wide.split(f.head_dim))
    return heads
