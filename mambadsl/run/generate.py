"""Text generation: prompts of token ids in, token ids out, with the model's decoding state.

The prompts are read in one pass, then one token a step. Prompts of unequal length are padded on the left;
padding reaches nothing. Refuses (ValueError) empty prompts, ids outside the vocabulary, a pipeline stage, a
model without values; and (TypeError) text where ids should be.
Letters: B batch, T time, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mambadsl.build.init import generator_of
from mambadsl.build.model import Model
from mambadsl.build.state import DecodingState
from mambadsl.run.sample import Sampling, sample

Stop = Sequence[int | Sequence[int]]


@dataclass(frozen=True, slots=True)
class Generated:
    """What followed one prompt. tokens: without the prompt, and without the stop tokens. ended: "stop" or
    "length"."""

    tokens: tuple[int, ...]
    ended: str


@dataclass(frozen=True, slots=True)
class Step:
    """One new token of prompt `row`. ended: "stop" (the token completes a stop), "length", or None."""

    row: int
    token: int
    ended: str | None = None


def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Stop = (),
    stream: Callable[[Step], None] | None = None,
) -> list[Generated]:
    """What the model writes after each prompt, at most `max_tokens` ids.

    stop: ids, or sequences of ids, that end a row; they are not part of its result. seed: of the draws; row i
    draws the same whatever the other rows are. stream: called with each `Step` as it comes.
    """
    stops = _stops(stop)
    written: list[list[int]] = [[] for _ in prompts]
    ended = ["length"] * len(written)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop)
    for step in steps(model, prompts, max_tokens=max_tokens, **sampling):
        written[step.row].append(step.token)
        ended[step.row] = step.ended or "length"
        if stream is not None:
            stream(step)
    for tokens, end in zip(written, ended):
        if end == "stop":
            del tokens[len(tokens) - len(_stopped(tokens, stops)) :]
    return [Generated(tuple(tokens), end) for tokens, end in zip(written, ended)]


def stream(model: Model, prompt: Sequence[int], *, max_tokens: int, **sampling) -> Iterator[int]:
    """The ids that follow one prompt, as they come: `generate`'s tokens, with its arguments. Ids that may be
    the start of a stop sequence wait until it is clear."""
    lines = steps(model, [prompt], max_tokens=max_tokens, **sampling)
    return _without_stops(lines, _stops(sampling.get("stop", ())))


def _without_stops(lines: Iterator[Step], stops: tuple[tuple[int, ...], ...]) -> Iterator[int]:
    held: list[int] = []
    for step in lines:
        held.append(step.token)
        if step.ended == "stop":
            yield from held[: len(held) - len(_stopped(held, stops))]
            return
        begun = 0 if step.ended else _begun(held, stops)
        yield from held[: len(held) - begun]
        held = held[len(held) - begun :]


def _begun(tokens: list[int], stops: tuple[tuple[int, ...], ...]) -> int:
    """How many of the last tokens are the start of a stop, at most."""
    starts = {s[:n] for s in stops for n in range(1, len(s))}
    return max((n for n in range(1, len(tokens) + 1) if tuple(tokens[-n:]) in starts), default=0)


def steps(
    model: Model, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Stop = (),
) -> Iterator[Step]:
    """Every new token of every prompt, as it comes. Arguments as `generate`, checked at once."""
    sampling = Sampling(temperature, top_k, top_p)
    stops = _stops(stop)
    _check(model, max_tokens)
    read = read_prompts(prompts, vocab=model.graph.model.vocab)
    return _steps(model, read, max_tokens, sampling, seed, stops)


def _steps(
    model: Model, prompts: list[list[int]], max_tokens: int, sampling: Sampling, seed: int,
    stops: tuple[tuple[int, ...], ...],
) -> Iterator[Step]:
    if not prompts or not max_tokens:
        return
    training = model.training
    model.eval()
    try:
        generators = [generator_of(f"row {row}", seed=seed) for row in range(len(prompts))]
        written: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        state = model.init_state(len(prompts))
        logits_BV = _read(model, *_padded(prompts, device=model.device), state)
        while True:
            for row in sorted(running):
                token = sample(logits_BV[row], sampling, generators[row])
                written[row].append(token)
                ended = None
                if _stopped(written[row], stops):
                    ended = "stop"
                elif len(written[row]) == max_tokens:
                    ended = "length"
                if ended:
                    running.remove(row)
                yield Step(row, token, ended)
            if not running:
                return
            # A finished row reads its last token again; nothing of it is used.
            next_B1 = torch.tensor([[tokens[-1]] for tokens in written], device=model.device)
            logits_BV = _read(model, next_B1, None, state)
    finally:
        model.train(training)


@torch.no_grad()
def _read(model: Model, tokens_BT: Tensor, valid_BT: Tensor | None, state: DecodingState) -> Tensor:
    """Logits after the last token of each row, [B, V]."""
    return model(tokens_BT, valid=valid_BT, state=state, last=1)[:, -1]


def _padded(prompts: list[list[int]], *, device) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, T] with padding on the left, and which are real (None: all)."""
    T = max(map(len, prompts))
    tokens_BT = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)
    if all(len(p) == T for p in prompts):
        return tokens_BT, None
    lengths_B = torch.tensor([len(p) for p in prompts], device=device)
    return tokens_BT, torch.arange(T, device=device) >= T - lengths_B[:, None]


def _stops(stop: Stop) -> tuple[tuple[int, ...], ...]:
    if isinstance(stop, str) or any(isinstance(s, str) for s in stop):
        raise TypeError("`stop` holds token ids, or sequences of ids, not text: encode it")
    found = tuple((s,) if isinstance(s, int) else tuple(s) for s in stop)
    if () in found:
        raise ValueError("an empty stop sequence would stop before the first token")
    return found


def _stopped(tokens: list[int], stops: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The longest stop that the tokens end in; () if they end in none."""
    return max((s for s in stops if tuple(tokens[-len(s) :]) == s), key=len, default=())


def _check(model: Model, max_tokens: int) -> None:
    if model.stage.count > 1:
        raise ValueError("text comes from a whole model; this is one stage of a pipeline")
    if model.device.type == "meta":
        raise ValueError("the model is on `meta`, without values; `build.init.materialise` gives them")
    if not hasattr(max_tokens, "__index__"):
        raise TypeError(f"max_tokens must be a whole number, not {max_tokens!r}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, not {max_tokens}")


def read_prompts(prompts: Sequence[Sequence[int]], *, vocab: int) -> list[list[int]]:
    """Prompts as lists of ids, checked."""
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
