"""Tables that are read in both directions: a field of ours, a setting of theirs.

Importing reads an entry from left to right, exporting from right to left; what an export gives is imported again and
compared, so a table that says less than the truth refuses rather than lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mambadsl.adapt.tensors import Place
from mambadsl.kinds.values import Values


class Unlike(Exception):
    """A value without a counterpart; the text completes "`hidden_act` ..."."""


@dataclass(frozen=True)
class Both:
    """A value both ways. keys: their settings; read: of all of theirs, may raise Unlike; write: their settings for a
    value of ours."""

    keys: tuple[str, ...]
    read: Callable[[Any], Any]
    write: Callable[[Any], Mapping[str, Any]]
    #: Always this; what tells recipes of one kind apart.
    always: bool = False


#: An entry of a table: the name of their setting, or both ways.
Entry: TypeAlias = "str | Both"


def key(name: str, read: Callable[[Any], Any] = lambda v: v, write: Callable[[Any], Any] = lambda v: v) -> Both:
    """One setting of theirs, converted."""
    return Both((name,), lambda c: read(getattr(c, name)), lambda value: {name: write(value)})


def words(name: str, table: Mapping[str, Any]) -> Both:
    """A word of theirs for a value of ours."""
    back = {ours: theirs for theirs, ours in reversed(table.items())}

    def read(value: Any) -> Any:
        if value not in table:
            raise Unlike(f"is `{value}`; with a counterpart: " + ", ".join(f"`{known}`" for known in table))
        return table[value]

    return key(name, read, lambda value: back.get(value, value))


def read_only(names: str | tuple[str, ...], read: Callable[[Any], Any]) -> Both:
    """Follows from settings that others write."""
    return Both((names,) if isinstance(names, str) else names, read, lambda value: {})


def fixed(value: Any) -> Both:
    """Theirs is always so."""
    return Both((), lambda c: value, lambda value: {}, always=True)


def both(entry: Entry) -> Both:
    return key(entry) if isinstance(entry, str) else entry


def read_fields(
    theirs: Any, table: Mapping[str, Entry], report: Callable[[str, str], None]
) -> dict[str, Any]:
    """Our fields out of all settings of theirs. report: is told of each that has no counterpart, by its name and what
    is wrong with it."""
    found = {}
    for ours, entry in table.items():
        entry = both(entry)
        try:
            found[ours] = entry.read(theirs)
        except Unlike as error:
            report(getattr(error, "name", entry.keys[0]), str(error))
    return found


@dataclass(frozen=True)
class Recipe:
    """A mixer of theirs. fields: our field (of the kind, the branch or the sublayer) -> theirs. names: our weight ->
    theirs, below the mixer's path, where the names differ; may depend on the fields."""

    kind: str
    fields: Mapping[str, Entry]
    names: Mapping[str, Place] | Callable[[Values], Mapping[str, Place]] = field(default_factory=dict)

    def places(self, fields: Values) -> Mapping[str, Place]:
        return self.names(fields) if callable(self.names) else self.names
