"""The protocol: what a family of Hugging Face's declares, read in both directions.

A family is a table: which setting of theirs is which field of ours, where the tensors of each layer lie, and in what
order the layers stand. Importing reads it from left to right, exporting from right to left, and what an export gives is
read again and compared, so a table that says less than the truth refuses rather than lies.
`families/<file>.py` has `FAMILIES`; the folder is the registration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from mambadsl.hf.config import Settings, Unlike
from mambadsl.hf.tensors import Place
from mambadsl.kinds.values import Values


@dataclass(frozen=True)
class Both:
    """A value both ways. keys: their settings; read: of a configuration, may raise Unlike; write: their settings for a
    value of ours."""

    keys: tuple[str, ...]
    read: Callable[[Settings], Any]
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


def fixed(value: Any) -> Both:
    """Theirs is always so."""
    return Both((), lambda c: value, lambda value: {}, always=True)


def both(entry: Entry) -> Both:
    return key(entry) if isinstance(entry, str) else entry


@dataclass(frozen=True)
class Recipe:
    """A mixer of theirs. fields: our field (of the kind, the branch or the sublayer) -> theirs. names: our weight ->
    theirs, below the mixer's path, where the names differ; may depend on the fields."""

    kind: str
    fields: Mapping[str, Entry]
    names: Mapping[str, Place] | Callable[[Values], Mapping[str, Place]] = field(default_factory=dict)

    def places(self, fields: Values) -> Mapping[str, Place]:
        return self.names(fields) if callable(self.names) else self.names


@dataclass(frozen=True)
class Layer:
    """One layer of ours. recipes, paths: of its branches, and where their tensors lie. norm, post_norm: the tensors of
    the norms before and behind it. owner: whose weights it has, where it shares them (`shared.T.0`). names: of its only
    branch, what the recipe does not know."""

    recipes: tuple[str, ...]
    paths: tuple[str, ...]
    norm: str = ""
    post_norm: str = ""
    owner: str = ""
    names: Mapping[str, Place] = field(default_factory=dict)


class Row(tuple):
    """The recipes of a layer's branches, on the way out. owner: whose weights it has."""

    owner: str

    def __new__(cls, recipes: Iterable[str], owner: str) -> Row:
        row = super().__new__(cls, recipes)
        row.owner = owner
        return row


@dataclass(frozen=True)
class Family:
    """model_type, architecture: as config.json has them.

    settings: ours of the whole model -> theirs. demands: settings of theirs that must be so. recipes: mixers by name.
    layers: of a configuration. order: settings that say the same layers (a row of recipes' names each); raises Unlike.
    derived: settings of theirs that follow from several fields (by recipe, with those around the mixer) and from ours
    of the model. follows: settings that say nothing that others do not say, or nothing that a model computes.
    embed, embed_norm, final, head: tensors. empty: patterns of tensors that hold nothing a model needs. renamed:
    parts of tensors' names -> what transformers may save them as. config: a configuration of values without a
    model_type, where they are this family's; then transformers has no class for it."""

    model_type: str
    architecture: str
    settings: Mapping[str, Entry]
    recipes: Mapping[str, Recipe]
    layers: Callable[[Settings], Iterator[Layer]]
    order: Callable[[Sequence[Row]], Mapping[str, Any]]
    demands: Mapping[str, Any] = field(default_factory=dict)
    embed: str = "model.embed_tokens.weight"
    embed_norm: str = ""
    final: str = "model.norm.weight"
    head: str = "lm_head.weight"
    empty: tuple[str, ...] = ()
    derived: Callable[[Mapping[str, Values], Values], Mapping[str, Any]] | None = None
    follows: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Mapping[str, Any]], Any] | None = None


@cache
def families() -> dict[str, Family]:
    """By model_type."""
    folder = Path(__file__).parent / "families"
    files = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    modules = (import_module(f"mambadsl.hf.families.{name}") for name in files)
    return {family.model_type: family for module in modules for family in module.FAMILIES}


def names() -> tuple[str, ...]:
    return tuple(families())
