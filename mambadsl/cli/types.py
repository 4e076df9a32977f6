"""Types of options: paths, words of a table that is only read when needed, sizes in bytes, lists of numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import click

_UNITS = {
    "": 1,
    "B": 1,
    **{
        f"{letter}{suffix}": base**power
        for power, letter in enumerate("KMGT", 1)
        for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
    },
}


class Words(click.ParamType):
    """One of the words that `words()` gives; others where `also(word)` says so."""

    name = "word"

    def __init__(self, words: Callable[[], Iterable[str]], *, also: Callable[[str], bool] = lambda word: False):
        self.words, self.also = words, also

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        words = tuple(self.words())
        if value in words or self.also(value):
            return value
        from mambadsl.text.spell import nearest

        near = nearest(value, words)
        meant = f"; did you mean `{near}`?" if near else ""
        self.fail(f"`{value}` is none of {', '.join(f'`{word}`' for word in words)}{meant}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in self.words() if word.startswith(incomplete)]


class Place(click.Path):
    """A path, which is not empty: a variable of the shell that is not set would be the folder one is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty: this folder is `.`", param, ctx)
        return super().convert(value, param, ctx)


class Size(click.ParamType):
    """`80GiB`, `40GB`, or bytes -> bytes. `G` alone is GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if not match or match[2] not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
            self.fail(f"`{value}` is not a size, as in `80GiB`", param, ctx)
        return size


class Numbers(click.ParamType):
    """`1,2,3` -> (1, 2, 3): whole numbers from 0."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
            self.fail(f"`{value}` is not a list of token ids, as in `1,2,3`", param, ctx)
        return tuple(map(int, parts))


COUNT = click.IntRange(min=1)
