"""Which kinds there are: every folder here with a kind.py, found by scan, and those that users add; imported only
when asked for.

`finders` are called, once each, when a name is unknown (installed plugins are looked at no sooner than that).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

from mambadsl.kinds.kind import Kind

#: Asked to add what they know; each is called once.
finders: list[Callable[[], None]] = []
_own: dict[str, Kind] = {}


@cache
def _shipped() -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/kind.py")))


def names() -> tuple[str, ...]:
    """Of the kinds shipped and added so far."""
    return (*_shipped(), *_own)


def known(name: str) -> bool:
    """Whether there is such a kind, here or in a plugin."""
    while name not in names() and finders:
        finders.pop()()
    return name in names()


def get(name: str) -> Kind:
    """The kind of that name; KeyError if there is none."""
    if not known(name):
        raise KeyError(name)
    return _own[name] if name in _own else import_module(f"mambadsl.kinds.{name}.kind").KIND


def all_kinds() -> tuple[Kind, ...]:
    return tuple(get(name) for name in names())


def add(kind: Kind) -> None:
    """Registers a user's kind. ValueError if the name is taken, is no lower-case word, or no module is named."""
    if _own.get(kind.name, kind) is not kind or kind.name in _shipped():
        raise ValueError(f"there is a kind `{kind.name}` already")
    if not kind.name.isidentifier() or not kind.name.islower():
        raise ValueError(f"a kind's name is a lower-case word, not `{kind.name}`")
    if not kind.module_code:
        raise ValueError(f"the kind `{kind.name}` must say where its torch module is: module_code=\"module:Class\"")
    _own[kind.name] = kind
