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

from mambadsl.adapt.table import Both, Entry, Recipe, both, fixed, key, read_only, words
from mambadsl.adapt.tensors import Place
from mambadsl.hf.config import Settings
from mambadsl.kinds.values import Values

#: What a family's file is written with.
__all__ = [
    "Both", "Family", "Layer", "Recipe", "Tail", "both", "families", "fixed", "key", "names", "read_only", "words",
]


#: The tensor of a norm's scale, beside which its shift lies as `.bias`; or the names of both.
NormAt: TypeAlias = "str | tuple[str, str]"


@dataclass(frozen=True)
class Layer:
    """One layer of ours. recipes, paths: of its branches, and where their tensors lie. norm, post_norm: the tensors of
    the norms before and behind it. affine: of `residual=affine`, those of the output and of the stream. owner: whose
    weights it has, where it shares them (`shared.T.0`). names: of its only branch, what the recipe does not know."""

    recipes: tuple[str, ...]
    paths: tuple[str, ...]
    norm: str = ""
    post_norm: str = ""
    affine: tuple[NormAt, ...] = ()
    owner: str = ""
    names: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Tail:
    """What predicts further tokens, as the tail that `mtp` is: the embedding comes first in the joint projection.

    keys: settings of theirs, each of which says how many depths there are; where none is given, the tensors tell.
    depths: how many; raises Unlike. layers: of one depth, from 0. ends: the tensors of its `enorm`, `hnorm`,
    `eh_proj` and `final_norm`. settings: that say so many depths of these rows; raises Unlike. follows: other settings
    that it reads. empty: patterns of its tensors that may stand beside a configuration without it."""

    keys: tuple[str, ...]
    depths: Callable[[Settings], int]
    layers: Callable[[Settings, int], Iterator[Layer]]
    ends: Callable[[Settings, int], Mapping[str, str]]
    settings: Callable[[int, Sequence[Row]], Mapping[str, Any]]
    follows: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()


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
    model_type, where they are this family's; then transformers has no class for it. tail: of multi-token prediction."""

    model_type: str
    architecture: str
    settings: Mapping[str, Entry]
    recipes: Mapping[str, Recipe]
    layers: Callable[[Settings], Iterator[Layer]]
    order: Callable[[Sequence[Row]], Mapping[str, Any]]
    demands: Mapping[str, Any] = field(default_factory=dict)
    embed: str = "model.embed_tokens.weight"
    embed_norm: NormAt = ""
    final: str = "model.norm.weight"
    head: str = "lm_head.weight"
    empty: tuple[str, ...] = ()
    derived: Callable[[Mapping[str, Values], Values], Mapping[str, Any]] | None = None
    follows: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Mapping[str, Any]], Any] | None = None
    tail: Tail | None = None


@cache
def families() -> dict[str, Family]:
    """By model_type."""
    folder = Path(__file__).parent / "families"
    files = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
    modules = (import_module(f"mambadsl.hf.families.{name}") for name in files)
    return {family.model_type: family for module in modules for family in module.FAMILIES}


def names() -> tuple[str, ...]:
    return tuple(families())
