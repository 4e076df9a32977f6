"""A layer before its defaults: what was given, so that it can be changed or joined and then filled anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mambadsl.kinds.fields import Mismatch
from mambadsl.kinds.kind import Kind
from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec.codes import E045, MAX_BRANCHES, short_count
from mambadsl.spec.fill import Given, fill
from mambadsl.spec.model import LayerSpec, Mixer
from mambadsl.text.diagnostic import Diagnostic, Label
from mambadsl.text.source import Span

SUB = tuple(f.name for f in SUBLAYER_FIELDS)
BRANCH = tuple(f.name for f in BRANCH_FIELDS)
#: A value that could not be computed, which was reported.
FAILED = object()


@dataclass(frozen=True)
class Branch:
    """One kind with its given fields. chain: the places that led here, innermost first."""

    kind: Kind
    given: dict[str, Given]
    name: str | None
    chain: tuple[Span, ...]


@dataclass(frozen=True)
class Recipe:
    """sub: given fields of the sublayer. chain: what came after the branches' own places."""

    branches: tuple[Branch, ...]
    sub: dict[str, Given]
    name: str | None = None
    chain: tuple[Span, ...] = ()

    def at(self, place: Span, *, name: str | None = None) -> Recipe:
        """The same, seen from one place further out: a declaration (with its name), an import."""
        return replace(self, name=name or self.name, chain=(*self.chain, place))

    @property
    def named(self) -> bool:
        """Whether a declared layer's name belongs to it."""
        return bool(self.name or any(branch.name for branch in self.branches))

    def legal(self) -> list[str]:
        """Fields that a changed copy may give: in a sum, those of the sublayer."""
        own = [f.name for f in self.branches[0].kind.fields] if len(self.branches) == 1 else []
        return [*own, *SUB, *(BRANCH if own else ())]

    def changed(self, given: dict[str, Given], place: Span) -> Recipe:
        """A copy with other fields; those of branches go to every branch."""
        own = {k: g for k, g in given.items() if k not in SUB}
        sub = {k: g for k, g in given.items() if k in SUB}
        branches = tuple(replace(b, given={**b.given, **own}) for b in self._named())
        return Recipe(branches, {**self.sub, **sub}, chain=(*self.chain, place))

    def _named(self) -> tuple[Branch, ...]:
        """Branches that keep the layer's name when it becomes another layer's."""
        if len(self.branches) > 1 or self.name is None:
            return self.branches
        return (replace(self.branches[0], name=self.name),)


def written(kind: Kind, given: dict[str, Given], place: Span) -> Recipe:
    """`mamba2(heads=8)`."""
    own = {k: g for k, g in given.items() if k not in SUB}
    return Recipe((Branch(kind, own, None, (place,)),), {k: g for k, g in given.items() if k in SUB})


def joined(recipes: list[Recipe], place: Span, report: Callable[[Diagnostic], None]) -> Recipe | None:
    """`M + A`: what one branch gives of the sublayer's fields is the sum's; two must agree."""
    sub: dict[str, Given] = {}
    for recipe in recipes:
        for key, given in recipe.sub.items():
            if key in sub and not _agree(key, sub[key], given):
                other = Label(sub[key].place, "and here another")
                message = f"the branches of a sum share one `{key}`"
                report(Diagnostic(E045, message, given.place, "given here", (other,)))
                return None
            sub.setdefault(key, given)
    branches = tuple(replace(b, chain=b.chain + r.chain) for r in recipes for b in r._named())
    if len(branches) > MAX_BRANCHES:
        message = f"a sum joins at most {MAX_BRANCHES} layers, not {short_count(len(branches))}"
        report(Diagnostic(E045, message, place))
        return None
    return Recipe(branches, sub, chain=(place,))


def _agree(key: str, one: Given, other: Given) -> bool:
    type = SUBLAYER_FIELDS[SUB.index(key)].type
    try:
        return type.convert(one.value) == type.convert(other.value)
    except Mismatch:
        return True  # reported where it is filled


def filled(recipe: Recipe, *, model: Values, report: Callable[[Diagnostic], None]) -> LayerSpec | None:
    """The layer with all its fields; None where one did not fit (reported)."""
    given = [*recipe.sub.values(), *(g for b in recipe.branches for g in b.given.values())]
    if any(g.value is FAILED for g in given):
        return None
    sub, sub_origins, fine = fill(SUBLAYER_FIELDS, recipe.sub, model=model, report=report)
    mixers = []
    for b in recipe.branches:
        values, origins, own_fine = fill(b.kind.fields, b.given, model=model, report=report)
        branch, more, branch_fine = fill(BRANCH_FIELDS, b.given, model=model, report=report)
        fine = fine and own_fine and branch_fine
        name = recipe.name if len(recipe.branches) == 1 and recipe.name else b.name
        chain = b.chain + recipe.chain
        mixers.append(Mixer(b.kind.name, values, branch, name, b.chain[0], {**origins, **more}, chain))
    if not fine:
        return None
    place = (recipe.branches[0].chain + recipe.chain)[-1]
    return LayerSpec(tuple(mixers), sub, recipe.name, place, sub_origins)
