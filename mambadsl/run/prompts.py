"""Prompts as batches of token ids, checked. Letters: B batch, T time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambadsl.build.model import Model


def check_model(model: Model) -> None:
    """ValueError for a model that cannot write."""
    if model.stage.count > 1:
        raise ValueError("text comes from a whole model; this is one stage of a pipeline")
    if model.device.type == "meta":
        raise ValueError("the model is on `meta`, without values; `build.init.materialise` gives them")


def check_count(max_tokens: int) -> None:
    if not hasattr(max_tokens, "__index__"):
        raise TypeError(f"max_tokens must be a whole number, not {max_tokens!r}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, not {max_tokens}")


def read_prompts(prompts: Sequence[Sequence[int]], *, vocab: int) -> list[list[int]]:
    """Prompts as lists of ids. ValueError for empty ones, and for ids outside the vocabulary."""
    found = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, (int, str)):
            raise ValueError(f"`prompts` is a list of prompts, each a list of token ids, not {prompt!r}")
        ids, which = [int(t) for t in prompt], f"prompt {row}" if len(prompts) > 1 else "the prompt"
        if not ids:
            raise ValueError(f"{which} is empty; a model needs at least one token to go on from")
        if bad := [t for t in ids if not 0 <= t < vocab]:
            raise ValueError(f"{which} has the id {bad[0]}; ids are from 0 to {vocab - 1} (vocab = {vocab})")
        found.append(ids)
    return found


def padded(prompts: list[list[int]], *, device: Any) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, T] with padding on the left, and which are real (None: all)."""
    T = max(map(len, prompts))
    tokens_BT = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    if all(len(p) == T for p in prompts):
        return tokens_BT, None
    lengths_B = torch.tensor([len(p) for p in prompts], device=device)
    return tokens_BT, torch.arange(T, device=device) >= T - lengths_B[:, None]
