"""Speculative decoding: the `mtp` tail drafts the next tokens, the model reads them in one pass and keeps those that it
would have written itself. What is written is what greedy decoding writes, up to the rounding of longer chunks.

Recurrent states cannot be cut back after a rejected draft. The model then goes on from a snapshot, and reads the tokens
kept since then again, together with the next drafts: each round is one pass, and gives at least one token.

In: one prompt at a time. Refuses (ValueError) more drafts than the tail has depths.
Letters: T time, D d_model; the batch is one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mambadsl.build.model import Model

#: Tokens since the snapshot, at most, before a round without drafts lets the state catch up.
PENDING = 8


def check_drafts(model: Model, drafts: int) -> None:
    """ValueError for more drafts than there are depths."""
    if drafts and not model.depths:
        raise ValueError("the model has no `mtp` tail to draft with")
    if not 0 <= drafts <= model.depths:
        raise ValueError(f"drafts are from 0 to {model.depths}, the depths of the `mtp` tail, not {drafts}")


@torch.no_grad()
def speculate(model: Model, prompt: Sequence[int], *, max_tokens: int, drafts: int) -> Iterator[list[int]]:
    """The ids that follow the prompt, `max_tokens` in all: those of one round at a time, 1 to 1 + drafts."""
    check_drafts(model, drafts)
    ids, end = list(prompt), len(prompt) + max_tokens
    # So many of the ids have gone into the state.
    state, read = model.init_state(1), 0
    drafters = [Drafter(model, depth) for depth in range(drafts)]
    drafted: list[int] = []
    while len(ids) < end:
        before = state.copy() if drafted else None
        h_1TD = model.hidden(_row(model, ids[read:] + drafted), state=state)
        # The model's own choice after the last id, and after each draft.
        own = model.logits(h_1TD[:, len(ids) - 1 - read :])[0].argmax(-1).tolist()
        kept = next((n for n, (one, other) in enumerate(zip(drafted, own)) if one != other), len(drafted))
        h_1TD = h_1TD[:, : len(ids) + kept - read]
        new = [*drafted[:kept], own[kept]]
        yield new
        ids += new
        if kept == len(drafted):
            read = len(ids) - 1
        else:
            state = before
        drafted = draft(drafters[: max(0, end - len(ids) - 1)], ids, h_1TD)
        if len(ids) - read > PENDING:
            drafted = []


def draft(drafters: Sequence[Drafter], ids: Sequence[int], h_1TD: Tensor) -> list[int]:
    """The ids that may follow, one of each drafter. h_1TD: the model's hidden states of the positions up to the last
    but one id, all that are new to the drafters and maybe some before."""
    drafted: list[int] = []
    if not drafters:
        return drafted
    certain_1TD, guessed_1TD = h_1TD[:, drafters[0].done + 1 - len(ids) :], h_1TD[:, :0]
    for drafter in drafters:
        certain_1TD, guessed_1TD = drafter.read(ids, drafted, certain_1TD, guessed_1TD)
        last_11D = (guessed_1TD if drafted else certain_1TD)[:, -1:]
        drafted.append(int(drafter.model.logits(last_11D).argmax()))
    return drafted


class Drafter:
    """A depth of the tail. state: after the positions whose tokens ahead are certain, `done` of them. held_1TD: hidden
    states, from the depth before it, of the certain positions after those."""

    def __init__(self, model: Model, depth: int):
        self.model, self.depth, self.done = model, depth, 0
        self.state = model.init_state(1, depth=depth)
        self.held_1TD: Tensor | None = None

    def read(
        self, ids: Sequence[int], drafted: Sequence[int], certain_1TD: Tensor, guessed_1TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The depth's hidden states of new positions: those that only ids have gone into, and those that drafts have.
        certain_1TD, guessed_1TD: the same of the depth before it."""
        if self.held_1TD is not None:
            certain_1TD = torch.cat((self.held_1TD, certain_1TD), 1)
        ahead = 1 + self.depth
        count = max(len(ids) - ahead - self.done, 0)
        found_1TD = self._run(ids[self.done + ahead :], certain_1TD[:, :count], self.state)
        self.done += count
        self.held_1TD = certain_1TD[:, count:]
        guessed_1TD = torch.cat((self.held_1TD, guessed_1TD), 1)
        after = drafted[len(drafted) - guessed_1TD.shape[1] :]
        return found_1TD, self._run(after, guessed_1TD, self.state.copy())

    def _run(self, ids: Sequence[int], h_1TD: Tensor, state) -> Tensor:
        return self.model.ahead(self.depth, _row(self.model, ids), h_1TD, state=state) if ids else h_1TD


def _row(model: Model, ids: Sequence[int]) -> Tensor:
    return torch.tensor([ids], device=model.device)
