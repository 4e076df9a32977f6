"""Logits of one token -> the id to go on with. Greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor


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
