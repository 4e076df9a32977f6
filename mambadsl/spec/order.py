"""What must come first: names in an order in which they can be computed, however long their chains are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Code, Diagnostic, Label

Key = TypeVar("Key", bound=Hashable)
#: Places of a circle that are shown; in a larger one, the first and the last.
MAX_SHOWN = 8


class Circle(Exception):
    """Keys that need each other, each the next, the last the first."""

    def __init__(self, keys: tuple):
        super().__init__(keys)
        self.keys = keys


def in_order(
    start: Key, *, needs: Callable[[Key], Iterable[Key]], done: Callable[[Key], bool]
) -> Iterator[Key]:
    """What `start` needs and is not done, each after all that it needs itself; `start` last. The caller
    makes each key done as it comes. Raises Circle."""
    path = {start: iter(needs(start))}
    while path:
        key = next(reversed(path))
        first = next((other for other in path[key] if not done(other)), None)
        if first is None:
            del path[key]
            yield key
        elif first in path:
            keys = list(path)
            raise Circle(tuple(keys[keys.index(first) :]))
        else:
            path[first] = iter(needs(first))


def circle(code: Code, names: list[tree.Name], *, built: str) -> Diagnostic:
    """The diagnostic of a circle, at its first name. built: "defined by", "built from"."""
    first, *others = names
    after = [*others, first]
    label = f"needs `{after[0].text}`" if others else "needs itself"
    labels = [Label(name.span, f"which needs `{then.text}`") for name, then in zip(others, after[1:])]
    labels = (*labels[: MAX_SHOWN - 1], *labels[MAX_SHOWN - 1 :][-1:])
    return Diagnostic(code, f"`{first.text}` is {built} itself", first.span, label, labels)
