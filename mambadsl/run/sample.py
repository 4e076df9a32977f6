"""Logits of one token -> the id to go on with. Greedy, or drawn with temperature, top-k and top-p.

`sample` is for one row, on the CPU, and says what is right; `draw` is for a batch where its logits are, waits for
nothing and gives the same ids, up to the rounding of sums.
Letters: B batch, V vocab, T tokens, K ids that may be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mambadsl.build.init import generator_of


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0: the most likely token. top_k: of only so many most likely
    tokens. top_p: of only the most likely ones that together have this much probability. ValueError for
    values that mean nothing."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, not {self.top_p}")


def sample(logits_V: Tensor, sampling: Sampling, generator: Generator) -> int:
    """The next id. Draws one number from the generator where the temperature is not 0, none where it is.

    In float64 on the CPU, by the inverse of the cumulative distribution: one uniform number a token, so a
    row draws the same tokens alone and in a batch.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    uniform = torch.rand((), dtype=torch.float64, generator=generator)
    ids_V, share_V = distribution(logits_V, sampling)
    cumulative_V = share_V.cumsum(0)
    at = int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))
    return int(ids_V[min(at, len(ids_V) - 1)])


def distribution(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids that may be drawn, most likely first, and their float64 shares (which need not sum to 1)."""
    logits_V, ids_V = logits_V.double().cpu().sort(descending=True, stable=True)
    if sampling.top_k is not None:
        logits_V, ids_V = logits_V[: sampling.top_k], ids_V[: sampling.top_k]
    share_V = ((logits_V - logits_V[0]) / sampling.temperature).softmax(0)
    if sampling.top_p is not None:
        # A token stays while those before it do not reach top_p: at least the first always does.
        keep_V = share_V.cumsum(0) - share_V < sampling.top_p
        ids_V, share_V = ids_V[keep_V], share_V[keep_V]
    return ids_V, share_V


def uniforms(rows: int, count: int, *, seed: int) -> Tensor:
    """The first numbers that `sample` would draw for each row, float64 [T, B] on the CPU."""
    drawn = [torch.rand(count, dtype=torch.float64, generator=generator_of(f"row {r}", seed=seed)) for r in range(rows)]
    return torch.stack(drawn, 1)


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """The next id of each row, int64 [B]; uniform_B: float64 numbers in [0, 1)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    K = min(sampling.top_k or logits_BV.shape[1], logits_BV.shape[1])
    ids_BK = _ordered(logits_BV, K)
    logits_BK = logits_BV.gather(1, ids_BK).double()
    share_BK = ((logits_BK - logits_BK[:, :1]) / sampling.temperature).softmax(-1)
    cumulative_BK = share_BK.cumsum(-1)
    kept_B1 = torch.full_like(ids_BK[:, :1], K)
    if sampling.top_p is not None:
        kept_B1 = (cumulative_BK - share_BK < sampling.top_p).sum(-1, keepdim=True)
    total_B1 = cumulative_BK.gather(1, kept_B1 - 1)
    at_B1 = (cumulative_BK <= uniform_B[:, None] * total_B1).sum(-1, keepdim=True)
    return ids_BK.gather(1, torch.minimum(at_B1, kept_B1 - 1))[:, 0]


def _ordered(logits_BV: Tensor, K: int) -> Tensor:
    """The K most likely ids, most likely first, equals by id: of keys that are all different, so that any sort will
    do (torch.topk leaves the order of equals open, and a stable sort sorts everything)."""
    V = logits_BV.shape[1]
    # The bits of a float, as an integer that is ordered as the float is; + 0.0 makes the two zeros one.
    bits_BV = (logits_BV.float() + 0.0).view(torch.int32)
    order_BV = torch.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV).long()
    key_BV = (order_BV << 32) + torch.arange(V - 1, -1, -1, device=logits_BV.device)
    best_BK = key_BV.topk(K).values if K < V else key_BV.sort(-1, descending=True).values
    return V - 1 - (best_BK & 0xFFFFFFFF)
