"""Text generation: prompts of token ids in, token ids out, with the model's decoding state.

The prompts are read in one pass, then one token a step; on a GPU with parts for decoding, through a
`Decoder`; or, where drafts are asked for, through `speculate`. Prompts of unequal length are padded on the left;
padding reaches nothing. Refuses (ValueError) empty prompts, ids outside the vocabulary, a pipeline stage, a model
without values, drafts that the tail does not make; and (TypeError) text where ids should be.
Letters: B batch, T time, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from mambadsl.build.init import generator_of
from mambadsl.build.model import Model
from mambadsl.build.state import DecodingState
from mambadsl.run.decode import Decoder
from mambadsl.run.prompts import check_count, check_model, padded, read_prompts
from mambadsl.run.sample import Sampling, sample
from mambadsl.run.speculate import check_drafts, speculate
from mambadsl.run.stop import Generated, Step, Stop, Stops, Writing, gather, stops_of, without_stops

#: Part sets whose models decode with a `Decoder` whatever their layers are.
DECODING_SETS = ("inference", "auto")


def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Stop = (),
    stream: Callable[[Step], None] | None = None, drafts: int = 0,
) -> list[Generated]:
    """What the model writes after each prompt, at most `max_tokens` ids.

    stop: ids, or sequences of ids, that end a row; they are not part of its result. seed: of the draws; row i
    draws the same whatever the other rows are. stream: called with each `Step` as it comes. drafts: how many tokens the
    `mtp` tail drafts for each that the model writes, up to its depths; for temperature 0, one prompt after the other.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop, drafts=drafts)
    lines = steps(model, prompts, max_tokens=max_tokens, **sampling)
    return gather(lines, rows=len(prompts), stops=stops_of(stop), stream=stream)


def stream(model: Model, prompt: Sequence[int], *, max_tokens: int, **sampling) -> Iterator[int]:
    """The ids that follow one prompt, as they come: `generate`'s tokens, with its arguments. Ids that may be
    the start of a stop sequence wait until it is clear."""
    lines = steps(model, [prompt], max_tokens=max_tokens, **sampling)
    return without_stops(lines, stops_of(sampling.get("stop", ())))


def steps(
    model: Model, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 0.0,
    top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Stop = (), drafts: int = 0,
) -> Iterator[Step]:
    """Every new token of every prompt, as it comes. Arguments as `generate`, checked at once."""
    sampling = Sampling(temperature, top_k, top_p)
    stops = stops_of(stop)
    check_model(model)
    check_count(max_tokens)
    read = read_prompts(prompts, vocab=model.graph.model.vocab)
    if not read or not max_tokens:
        return iter(())
    if drafts:
        check_drafts(model, drafts)
        if temperature:
            raise ValueError(f"drafts are held to the likeliest tokens: temperature must be 0, not {temperature}")
        return _speculate(model, read, max_tokens, drafts, stops)
    write = _decode if has_decoder(model) else _write
    return write(model, read, max_tokens, sampling, seed, stops)


def has_decoder(model: Model) -> bool:
    """The model is on a GPU and was built for decoding: its part set says so, or a part of it does."""
    if model.device.type != "cuda":
        return False
    return model.assignment.asked in DECODING_SETS or any(layer.has_step for _, layer in model.sublayers())


def _decode(
    model: Model, prompts: list[list[int]], max_tokens: int, sampling: Sampling, seed: int, stops: Stops
) -> Iterator[Step]:
    how = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    capacity = max(map(len, prompts)) + max_tokens - 1
    with Decoder(model, batch=len(prompts), capacity=capacity, **how) as decoder:
        decoder.prefill(prompts, seed=seed)
        yield from decoder.steps(max_tokens, stop=stops)


def _speculate(
    model: Model, prompts: list[list[int]], max_tokens: int, drafts: int, stops: Stops
) -> Iterator[Step]:
    training = model.training
    model.eval()
    try:
        for row, prompt in enumerate(prompts):
            writing = Writing(1, max_tokens=max_tokens, stops=stops)
            found = chain.from_iterable(speculate(model, prompt, max_tokens=max_tokens, drafts=drafts))
            while writing.running:
                for step in writing.take(lambda _: next(found)):
                    yield replace(step, row=row)
    finally:
        model.train(training)


def _write(
    model: Model, prompts: list[list[int]], max_tokens: int, sampling: Sampling, seed: int, stops: Stops
) -> Iterator[Step]:
    training = model.training
    model.eval()
    try:
        generators = [generator_of(f"row {row}", seed=seed) for row in range(len(prompts))]
        writing = Writing(len(prompts), max_tokens=max_tokens, stops=stops)
        state = model.init_state(len(prompts))
        logits_BV = _read(model, *padded(prompts, device=model.device), state)
        while True:
            yield from writing.take(lambda row: sample(logits_BV[row], sampling, generators[row]))
            if not writing.running:
                return
            # A finished row reads its last token again; nothing of it is used.
            next_B1 = torch.tensor([[tokens[-1]] for tokens in writing.written], device=model.device)
            logits_BV = _read(model, next_B1, None, state)
    finally:
        model.train(training)


@torch.no_grad()
def _read(model: Model, tokens_BT: Tensor, valid_BT: Tensor | None, state: DecodingState) -> Tensor:
    """Logits after the last token of each row, [B, V]."""
    return model(tokens_BT, valid=valid_BT, state=state, last=1)[:, -1]
