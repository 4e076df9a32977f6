"""When a row of generated tokens ends, and what is told of each token on the way.

In: ids, row by row and token by token, from whatever computes them. Out: a `Step` for each, and each row's `Generated`.
Refuses (TypeError) text as a stop, (ValueError) an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Stop = Sequence[int | Sequence[int]]
Stops = tuple[tuple[int, ...], ...]


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


class Writing:
    """Rows as they are written. running: those that have not ended. written: the ids of each so far."""

    def __init__(self, rows: int, *, max_tokens: int, stops: Stops):
        self.running = set(range(rows))
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self.max_tokens, self.stops = max_tokens, stops

    def take(self, token_of: Callable[[int], int]) -> Iterator[Step]:
        """One more token of every row that runs; `token_of` a row."""
        for row in sorted(self.running):
            tokens = self.written[row]
            tokens.append(token_of(row))
            ended = None
            if stopped(tokens, self.stops):
                ended = "stop"
            elif len(tokens) == self.max_tokens:
                ended = "length"
            if ended:
                self.running.remove(row)
            yield Step(row, tokens[-1], ended)


def gather(
    steps: Iterable[Step], *, rows: int, stops: Stops, stream: Callable[[Step], None] | None = None
) -> list[Generated]:
    """Each row's tokens without its stop; `stream` hears every step."""
    written: list[list[int]] = [[] for _ in range(rows)]
    ended = ["length"] * rows
    for step in steps:
        written[step.row].append(step.token)
        ended[step.row] = step.ended or "length"
        if stream is not None:
            stream(step)
    for tokens, end in zip(written, ended):
        if end == "stop":
            del tokens[len(tokens) - len(stopped(tokens, stops)) :]
    return [Generated(tuple(tokens), end) for tokens, end in zip(written, ended)]


def without_stops(steps: Iterable[Step], stops: Stops) -> Iterator[int]:
    """The ids of a single row as they come; those that may be the start of a stop wait until it is clear."""
    held: list[int] = []
    for step in steps:
        held.append(step.token)
        if step.ended == "stop":
            yield from held[: len(held) - len(stopped(held, stops))]
            return
        begun = 0 if step.ended else _begun(held, stops)
        yield from held[: len(held) - begun]
        held = held[len(held) - begun :]


def _begun(tokens: list[int], stops: Stops) -> int:
    """How many of the last tokens are the start of a stop, at most."""
    starts = {s[:n] for s in stops for n in range(1, len(s))}
    return max((n for n in range(1, len(tokens) + 1) if tuple(tokens[-n:]) in starts), default=0)


def stops_of(stop: Stop) -> Stops:
    if isinstance(stop, str) or any(isinstance(s, str) for s in stop):
        raise TypeError("`stop` holds token ids, or sequences of ids, not text: encode it")
    found = tuple((s,) if isinstance(s, int) else tuple(s) for s in stop)
    if () in found:
        raise ValueError("an empty stop sequence would stop before the first token")
    return found


def stopped(tokens: list[int], stops: Stops) -> tuple[int, ...]:
    """The longest stop that the tokens end in; () if they end in none."""
    return max((s for s in stops if tuple(tokens[-len(s) :]) == s), key=len, default=())
