"""What a misspelt word was probably meant to be, out of the words that are legal at its place."""

from __future__ import annotations

from typing import Collection, Iterable

#: Pairs of letters compared for one word, so that suggestions take milliseconds whatever a file holds.
_MOST_PAIRS = 10_000


def nearest(word: str, legal: Iterable[str]) -> str | None:
    """The legal word closest to `word`, or None where nothing is close."""
    return next(iter(nearest_all(word, legal, most=1)), None)


def nearest_all(word: str, legal: Iterable[str], *, most: int = 3) -> tuple[str, ...]:
    """Up to `most` legal words, nearest first: at most two in five letters wrong, where case and
    underscores do not count and two exchanged neighbours are one mistake."""
    plain = _plain(word)[:64]
    found, pairs = [], 0
    for candidate in dict.fromkeys(legal):
        other = _plain(candidate)
        longer = max(len(plain), len(other))
        limit = 2 * longer // 5 if longer > 2 else 0
        if abs(len(plain) - len(other)) > limit:
            continue
        pairs += len(plain) * len(other)
        if pairs > _MOST_PAIRS:
            break
        if (distance := edits(plain, other)) <= limit and plain and other and candidate != word:
            found.append((distance, plain[0] != other[0], len(found), candidate))
    return tuple(candidate for *_, candidate in sorted(found)[:most])


def edits(a: str, b: str) -> int:
    """Letters to insert, delete, replace or exchange with the next, to turn `a` into `b`
    (optimal string alignment)."""
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            best = min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, previous = previous, row
    return previous[-1]


def split_layers(word: str, layers: Collection[str]) -> str | None:
    """`MMMA` with layers M and A -> `M M M A`: the fewest layers that spell the word, or None."""
    layers = [layer for layer in layers if layer and layer in word]
    if len(word) * len(layers) > _MOST_PAIRS:
        return None
    # How many layers spell the word up to each letter, and the last of them.
    fewest: list[tuple[int, str] | None] = [(0, "")]
    for end in range(1, len(word) + 1):
        ways = (
            (before[0] + 1, layer) for layer in layers
            if len(layer) <= end and (before := fewest[end - len(layer)]) and word.endswith(layer, 0, end)
        )
        fewest.append(min(ways, default=None, key=lambda way: way[0]))
    found, end = [], len(word)
    while end and fewest[end]:
        found.append(fewest[end][1])
        end -= len(found[-1])
    return " ".join(reversed(found)) if found and not end else None


def _plain(word: str) -> str:
    return word.replace("_", "").lower()
