"""Compressed convolutional attention by definition: one token, one head, one tap at a time.

Letters: B batch, T time, D d_model, H query heads, K key/value heads, P head_dim, C channels of all queries and keys.
The state is, for each row, the list of its tokens so far: (document, position, qk_C, v_next, k_KP, v_KP), the second
two as they are projected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mambadsl.kinds.attention.kind import rotary_dim
from mambadsl.kinds.attention.naive import turn
from mambadsl.kinds.kind import Dims
from mambadsl.kinds.tokens import PADDING, Tokens
from mambadsl.kinds.values import Values

State = list[list[tuple[int, int, Tensor, Tensor, Tensor, Tensor]]]


def naive(
    weights: Mapping[str, Tensor], f: Values, dims: Dims, x_BTD: Tensor, tokens: Tokens, state: State | None = None,
) -> tuple[Tensor, State]:
    """Padding gives zeros."""
    B, T, _ = x_BTD.shape
    positions = tokens.positions_BT.tolist()
    segments = [[0] * T] * B if tokens.segments_BT is None else tokens.segments_BT.tolist()
    rows: State = [[] for _ in range(B)] if state is None else [list(row) for row in state]
    y = [[x_BTD.new_zeros(dims.d_model)] * T for _ in range(B)]
    half = f.kv_heads * f.head_dim // 2

    for b in range(B):
        for t in range(T):
            document, position = segments[b][t], positions[b][t]
            if document == PADDING:
                continue
            length = 1 + max(p for p, s in zip(positions[b], segments[b]) if s == document)
            projected = weights["qkv_proj.weight"] @ x_BTD[b, t] + weights.get("qkv_proj.bias", 0)
            qk_C, v_now, v_next = projected.split([len(projected) - 2 * half, half, half])
            past = [token for token in rows[b] if token[0] == document]
            nothing = weights["qkv_proj.bias"][-half:] if f.bias else torch.zeros_like(v_next)
            v_KP = torch.cat([v_now, past[-1][3] if past else nothing]).view(f.kv_heads, f.head_dim)
            q_HP, k_KP = queries_and_keys(weights, f, [token[2] for token in past] + [qk_C])
            if f.rope.name != "none":
                q_HP = [turn(q, f.rope, rotary_dim(f), position, length) for q in q_HP]
                k_KP = [turn(k, f.rope, rotary_dim(f), position, length) for k in k_KP]
            rows[b].append((document, position, qk_C, v_next, torch.stack(k_KP), v_KP))
            seen = [
                (k, v) for (s, p, _, _, k, v) in rows[b]
                if s == document and p <= position and (f.window is None or p > position - f.window)
            ]
            heads = [one_head(q_HP[h], seen, h * f.kv_heads // f.heads) for h in range(f.heads)]
            y[b][t] = weights["o_proj.weight"] @ torch.cat(heads) + weights.get("o_proj.bias", 0)
    return torch.stack([torch.stack(row) for row in y]), rows


def queries_and_keys(
    weights: Mapping[str, Tensor], f: Values, document: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Those of the last token. document: projected queries and keys of all its tokens so far."""
    last, each, P = len(document) - 1, f.heads // f.kv_heads, f.head_dim

    def channelwise(t: int) -> Tensor:
        found = weights["conv.bias"]
        for tap in range(f.d_conv):
            at = t - (f.d_conv - 1 - tap)
            found = found + (weights["conv.weight"][:, tap] * document[at] if at >= 0 else 0)
        return found

    heads = list(weights["head_conv.bias"].split(P))
    for tap in range(f.d_head_conv):
        inputs = channelwise(last - (f.d_head_conv - 1 - tap)).split(P)
        for g, input_P in enumerate(inputs):
            heads[g] = heads[g] + weights["head_conv.weight"][g, :, :, tap] @ input_P
    plain = document[last].split(P)
    means = [(plain[h] + plain[f.heads + h // each]) / 2 for h in range(f.heads)]
    queries = [unit(heads[h] + means[h]) for h in range(f.heads)]
    keys = []
    for h in range(f.kv_heads):
        mean = sum(means[h * each : (h + 1) * each]) / each
        keys.append(unit(heads[f.heads + h] + mean) * weights["temperature"][h])
    return queries, keys


def unit(x_P: Tensor) -> Tensor:
    """Of length sqrt(P)."""
    return x_P * len(x_P) ** 0.5 / torch.sqrt((x_P * x_P).sum())


def one_head(q_P: Tensor, seen: list[tuple[Tensor, Tensor]], kv_head: int) -> Tensor:
    scores = torch.stack([(q_P * k_KP[kv_head]).sum() for k_KP, _ in seen]) * len(q_P) ** -0.5
    powers = torch.exp(scores - scores.max().detach())
    return sum(power / powers.sum() * v_KP[kv_head] for power, (_, v_KP) in zip(powers, seen))
