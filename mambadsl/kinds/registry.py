"""Which kinds there are: every folder here with a kind.py, found by scan; import only when asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from mambadsl.kinds.kind import Kind


@cache
def names() -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/kind.py")))


@cache
def get(name: str) -> Kind:
    """The kind of that name; KeyError if there is none."""
    if name not in names():
        raise KeyError(name)
    return import_module(f"mambadsl.kinds.{name}.kind").KIND


def all_kinds() -> tuple[Kind, ...]:
    return tuple(get(name) for name in names())
