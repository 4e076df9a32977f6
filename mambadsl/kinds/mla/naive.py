"""Multi-head latent attention by definition: one query, one head, one key at a time, keys and values made anew from the
latents for each query.

Letters: B batch, T time, D d_model, H heads, N nope_dim, R rope_dim, P value_dim, C kv_rank. The state is, for each
row, the list of its tokens so far: (document, position, latent_C, key_R).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mambadsl.kinds.attention.naive import frequency, rms
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import PADDING, Tokens
from mambadsl.kinds.values import Values, Variant

State = list[list[tuple[int, int, Tensor, Tensor]]]


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens, state: State | None = None,
) -> tuple[Tensor, State]:
    """Padding gives zeros."""
    B, T, _ = x_BTD.shape
    positions = tokens.positions_BT.tolist()
    segments = [[0] * T] * B if tokens.segments_BT is None else tokens.segments_BT.tolist()
    rows: State = [[] for _ in range(B)] if state is None else [list(row) for row in state]
    y = [[x_BTD.new_zeros(dims.d_model)] * T for _ in range(B)]

    for b in range(B):
        for t in range(T):
            document, position = segments[b][t], positions[b][t]
            if document == PADDING:
                continue
            length = 1 + max(p for p, s in zip(positions[b], segments[b]) if s == document)
            q_HE, latent_C, key_R, gate = project(weights, f, x_BTD[b, t], position, length)
            rows[b].append((document, position, latent_C, key_R))
            seen = [(c, k) for (s, p, c, k) in rows[b] if s == document and p <= position]
            heads = [one_head(weights, f, h, q_HE[h], seen) for h in range(f.heads)]
            if f.out_gate == "per_head":
                heads = [head_P * torch.sigmoid(gate[h]) for h, head_P in enumerate(heads)]
            y_I = torch.cat(heads)
            if f.out_gate == "elementwise":
                y_I = y_I * torch.sigmoid(gate)
            y[b][t] = weights["o_proj.weight"] @ y_I
    return torch.stack([torch.stack(row) for row in y]), rows


def project(
    weights: Mapping[str, Tensor], f: Values, x_D: Tensor, position: int, length: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """One token: queries of each head, the latent, the keys' common channels, and the gate (empty without one)."""
    width = f.q_rank or f.heads * (f.nope_dim + f.rope_dim)
    entered = weights["in_proj.weight"] @ x_D
    q, latent_C, key_R, gate = entered.split(
        [width, f.kv_rank, f.rope_dim, len(entered) - width - f.kv_rank - f.rope_dim]
    )
    if f.q_rank:
        q = weights["q_proj.weight"] @ rms(q, weights["q_norm.weight"], f.norm_eps)
    latent_C = rms(latent_C, weights["latent_norm.weight"], f.norm_eps)
    q_HE = list(q.split(f.nope_dim + f.rope_dim))
    if f.rope.name == "rope":
        q_HE = [torch.cat((q[: f.nope_dim], turn(q[f.nope_dim :], f.rope, position, length))) for q in q_HE]
        key_R = turn(key_R, f.rope, position, length)
    return q_HE, latent_C, key_R, gate


def turn(x_R: Tensor, rope: Variant, position: int, length: int) -> Tensor:
    """A vector of rope_dim channels, rotated by its position."""
    R, s, out = len(x_R), rope.scaling, list(x_R)
    scale = 1.0
    if s.name == "yarn":
        auto = 0.1 * math.log(s.factor) + 1 if s.factor > 1 else 1.0
        scale = auto if s.attention_factor is None else s.attention_factor
    for i in range(R // 2):
        first, second = (i, i + R // 2) if rope.pairs == "half" else (2 * i, 2 * i + 1)
        angle = position * frequency(rope, R, i, length)
        a, b = x_R[first], x_R[second]
        out[first] = (a * math.cos(angle) - b * math.sin(angle)) * scale
        out[second] = (b * math.cos(angle) + a * math.sin(angle)) * scale
    return torch.stack(out)


def one_head(
    weights: Mapping[str, Tensor], f: Values, h: int, q_E: Tensor, seen: list[tuple[Tensor, Tensor]]
) -> Tensor:
    H, N, P = f.heads, f.nope_dim, f.value_dim
    keys_NC = weights["kv_proj.weight"][h * N : (h + 1) * N]
    values_PC = weights["kv_proj.weight"][H * N + h * P : H * N + (h + 1) * P]
    scale = (N + f.rope_dim) ** -0.5 if f.scale is None else f.scale
    scores = [(q_E * torch.cat((keys_NC @ latent_C, key_R))).sum() * scale for latent_C, key_R in seen]
    largest = max(float(score.detach()) for score in scores)
    powers = [torch.exp(score - largest) for score in scores]
    total = sum(powers)
    return sum(power / total * (values_PC @ latent_C) for power, (latent_C, _) in zip(powers, seen))
