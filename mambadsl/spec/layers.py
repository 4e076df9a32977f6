"""Names and patterns -> elements: layers with all their fields, blocks kept folded.

A layer that is wrong is reported once, where it is declared, and stands as None: its uses are passed over.
What a layer is built from is resolved first, so no chain of names is a chain of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

from mambadsl.kinds import registry
from mambadsl.kinds.sublayer import PER_USE_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec import codes
from mambadsl.spec.fill import E022, Given, unknown
from mambadsl.spec.model import Block, Cut, Element, Use
from mambadsl.spec.order import Circle, circle, in_order
from mambadsl.spec.recipes import BRANCH, FAILED, SUB, Recipe, filled, joined, written
from mambadsl.spec.scope import E024, E025, FileScope
from mambadsl.spec.scopes import Scopes
from mambadsl.spec.values import E042, E043, Problem, evaluate
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label
from mambadsl.text.source import Span
from mambadsl.text.spell import nearest, split_layers

#: A layer's name in a file that declares or imports it.
_Key: TypeAlias = "tuple[FileScope, str]"


class Layers:
    """All layers of one model. model: its settings, filled."""

    def __init__(self, scopes: Scopes, model: Values, report: Callable[[Diagnostic], None]):
        self.scopes, self.model, self.report = scopes, model, report
        self._elements: dict[_Key, Element | None] = {}
        #: By identity of a Use's layer, which is kept here so that no other can get its id.
        self._recipes: dict[int, tuple[Recipe, Any]] = {}
        self._shared: dict[str, tree.Name] = {}

    def layer(self, scope: FileScope, name: tree.Name) -> Element | None:
        """What a layer's name means in a file: an element, or None where that is reported already."""
        key = self._key(scope, name)
        if key is None:
            if name.text not in scope.broken:
                self._no_layer(scope, name)
            return None
        while key not in self._elements:
            try:
                for each in in_order(key, needs=self._needs, done=self._elements.__contains__):
                    self._elements[each] = self._resolved(*each)
            except Circle as found:
                names = [s.layers[n].name for s, n in found.keys if n in s.layers]
                self.report(circle(E025, names, built="built from"))
                self._elements.update(dict.fromkeys(found.keys))
        return self._elements[key]

    def _key(self, scope: FileScope, name: tree.Name) -> _Key | None:
        if name.text in scope.layers or name.text in scope.imports:
            return scope, name.text
        if name.text in scope.broken or name.text not in self.scopes.std().layers:
            return None
        return self.scopes.std(name.span), name.text

    def _needs(self, key: _Key) -> Iterator[_Key]:
        scope, name = key
        if name in scope.imports:
            yield scope.imports[name].scope, name
            return
        for use in _uses_in(scope.layers[name].item):
            if (other := self._key(scope, use.name)) is not None:
                yield other

    def _resolved(self, scope: FileScope, name: str) -> Element | None:
        if name in scope.layers:
            return self._definition(scope.layers[name], scope)
        there = scope.imports[name]
        element = self._elements[there.scope, name]
        if isinstance(element, Use):
            return self._use(self._recipe(element).at(there.name.span), element.span)
        return element and replace(element, chain=(*element.chain, there.name.span))

    def _definition(self, definition: tree.Layer, scope: FileScope) -> Element | None:
        name, place = definition.name.text, definition.name.span
        element = self.item(definition.item, scope)
        if element is None:
            return None
        if definition.shared:
            return self._shared_item(definition, element)
        if isinstance(element, Use):
            return self._use(self._recipe(element).at(place, name=name), definition.span)
        if element.shared is None and element.name is None:
            return replace(element, name=name, chain=(place,))
        return self._block(definition.span, (element,), name=name, chain=(place,))

    def _shared_item(self, definition: tree.Layer, element: Element) -> Element | None:
        name, place = definition.name.text, definition.name.span
        first = self._shared.setdefault(name, definition.name)
        if first is not definition.name:
            labels = (Label(first.span, "the other one"),)
            message = f"two files of the model declare `shared {name}`"
            help = ("weights are named by it: rename one of the two",)
            self.report(Diagnostic(E024, message, place, "again here", labels, help=help))
            return None
        if isinstance(element, Block) and element.cut is not None:
            message = f"`{name}` is shared, and used whole: no `|` in it"
            self.report(Diagnostic(codes.E049, message, element.cut.span))
            return None
        if inner := next((b for b in _blocks((element,)) if b.shared), None):
            message = f"`{name}` is shared, and so is `{inner.shared}` in it: whose weights are they?"
            help = (f"`layer {name} = ...` is a block that may hold shared layers",)
            self.report(Diagnostic(codes.E046, message, inner.span, "shared already", help=help))
            return None
        if isinstance(element, Use) and not self._recipe(element).named:
            element = self._use(self._recipe(element).at(place, name=name), definition.span)
        return self._block(definition.span, (element,), shared=name, name=name, chain=(place,))

    def _no_layer(self, scope: FileScope, name: tree.Name) -> None:
        legal = [*scope.layers, *(n for n in scope.imports if n[0].isupper())]
        usual = [n for n in self.scopes.std().layers if n not in legal]
        split = split_layers(name.text, {*legal, *usual}) if len(name.text) <= 60 else None
        near = nearest(name.text, legal)
        if split:
            help = f"did you mean `{split}`? Layers are separated by spaces"
        elif near:
            help = f"did you mean `{near}`?"
        elif legal:
            here = ", ".join(legal[:20]) + (", ..." if len(legal) > 20 else "")
            help = f"layers here: {here}" + (f"; and from std.mdl: {', '.join(usual)}" if usual else "")
        else:
            help = f"declare it: `layer {short(name.text)} = mamba2(...)`; std.mdl has {', '.join(usual)}"
        message = f"there is no layer `{short(name.text)}`"
        self.report(Diagnostic(codes.E020, message, name.span, "unknown layer", help=(help,)))

    # -- patterns

    def pattern(self, pattern: tree.Pattern, scope: FileScope) -> tuple[Element, ...]:
        items = (Cut(i.span) if isinstance(i, tree.Cut) else self.item(i, scope) for i in pattern.items)
        return tuple(item for item in items if item is not None)

    def item(self, node: tree.Item, scope: FileScope) -> Element | None:
        match node:
            case tree.Group():
                inner = self.pattern(node.pattern, scope)
                if len(inner) < len(node.pattern.items):
                    return None
                if len(inner) == 1 and isinstance(inner[0], Use):
                    return inner[0]
                return self._block(node.span, inner)
            case tree.Repeat():
                return self._repeat(node, scope)
            case tree.Parallel():
                return self._parallel(node, scope)
            case tree.Term():
                return self._kind(node, scope)
            case tree.Use():
                return self._named(node, scope)
        raise TypeError(type(node).__name__)

    def _repeat(self, node: tree.Repeat, scope: FileScope) -> Element | None:
        if node.count < 1:
            place, label = node.count_span, f"{node.count} times"
            help = ("leave the item out",)
            self.report(Diagnostic(codes.E047, "a repeat is at least 1", place, label, help=help))
            return None
        element = self.item(node.item, scope)
        if element is None or node.count == 1:
            return element
        plain = isinstance(element, Block) and element.count == 1 and not (element.shared or element.name)
        return self._block(node.span, element.items if plain else (element,), count=node.count)

    def _block(self, span: Span, items: tuple[Element, ...], **more: Any) -> Block | None:
        """A block within bounds; so nothing that walks blocks can take long."""
        block = Block(items, span=span, **more)
        if block.layers == 0:
            self.report(Diagnostic(codes.E049, "this block has no layers, only cuts", span))
            return None
        if block.layers > codes.MAX_LAYERS:
            count = codes.short_count(block.layers)
            message = f"this lays out {count} layers; a model has at most {codes.MAX_LAYERS:,}"
            self.report(Diagnostic(codes.E047, message, span))
            return None
        if block.depth > codes.MAX_DEPTH:
            message = f"blocks stand inside one another more than {codes.MAX_DEPTH} deep"
            self.report(Diagnostic(codes.E047, message, span))
            return None
        return block

    def _kind(self, node: tree.Term, scope: FileScope) -> Element | None:
        name = node.name.text
        if not registry.known(name):
            self.report(no_kind(name, node.name.span))
            self._only_values(node.args or (), scope)
            return None
        kind = registry.get(name)
        legal = [*(f.name for f in kind.fields), *SUB, *BRANCH]
        given = self.arguments(node.args or (), scope, f"`{name}`", legal)
        return self._use(written(kind, given, node.span), node.span)

    def _named(self, node: tree.Use, scope: FileScope) -> Element | None:
        name = node.name.text
        element = self.layer(scope, node.name)
        if element is None:
            self._only_values(node.args or (), scope)
            return None
        if not node.args:
            return replace(element, span=node.span)
        if isinstance(element, Block):
            if element.shared:
                return self._per_use(node, element, scope)
            help = ("change the layer inside, or write a block of its own",)
            self.report(Diagnostic(
                codes.E044, f"`{name}` is a block; a field can be changed in a single layer only", node.span,
                "a block cannot be reached into", help=help,
            ))
            return None
        recipe = self._recipe(element)
        several = len(recipe.branches) > 1
        owner = f"the sum `{name}`" if several else f"`{name}` (a `{recipe.branches[0].kind.name}`)"
        given = self.arguments(node.args, scope, owner, recipe.legal())
        return self._use(recipe.changed(given, node.span), node.span)

    def _per_use(self, node: tree.Use, block: Block, scope: FileScope) -> Element | None:
        """A shared item at one use: only fields that are not part of its weights may change."""
        name = node.name.text
        for arg in node.args:
            if arg.name is not None and arg.name.text not in PER_USE_FIELDS:
                self.report(Diagnostic(
                    codes.E046, f"`{name}` is shared: every use has the same weights and fields",
                    arg.name.span, "cannot differ from use to use",
                    help=("only `adapter` may; or declare another `layer`",),
                ))
                return None
        given = self.arguments(node.args, scope, f"the shared `{name}`", list(PER_USE_FIELDS))
        changed = self._changed(block, given, node.span, {})
        return changed and replace(changed, span=node.span)

    def _changed(self, element: Element, given: dict[str, Given], at: Span, done: dict) -> Element | None:
        """done: results by identity of the items, since blocks hold the same ones again and again."""
        if isinstance(element, Use):
            return self._use(self._recipe(element).changed(given, at), element.span)
        if id(element.items) not in done:
            done[id(element.items)] = tuple(self._changed(e, given, at, done) for e in element.items)
        items = done[id(element.items)]
        return None if any(e is None for e in items) else replace(element, items=items)

    def _parallel(self, node: tree.Parallel, scope: FileScope) -> Element | None:
        recipes: list[Recipe] = []
        for branch in node.branches:
            element = self.item(branch, scope)
            if isinstance(element, Use):
                recipes.append(self._recipe(element))
            elif element is not None:
                what = "a shared layer" if element.shared else "a block"
                help = ("share the sum instead: `shared S = M + A`",) if element.shared else ()
                message = "a sum joins single layers"
                self.report(Diagnostic(codes.E045, message, branch.span, f"this is {what}", help=help))
        if len(recipes) < len(node.branches):
            return None
        recipe = joined(recipes, node.span, self.report)
        return recipe and self._use(recipe, node.span)

    # -- values

    def value(self, value: tree.Value, scope: FileScope) -> Any:
        """The raw value of an expression; FAILED where it has none (reported)."""
        try:
            return evaluate(value, scope)
        except Problem as problem:
            self.report(problem.diagnostic)
            return FAILED

    def _only_values(self, args: tuple[tree.Arg, ...], scope: FileScope) -> None:
        """What is wrong in the arguments themselves, where nobody is there to take them."""
        for arg in args:
            self.value(arg.value, scope)

    def arguments(
        self, args: tuple[tree.Arg, ...], scope: FileScope, owner: str, legal: list[str] | None
    ) -> dict[str, Given]:
        """The given fields of a call. legal: the fields there are (None: any)."""
        found: dict[str, Given] = {}
        for arg in args:
            value = self.value(arg.value, scope)
            if arg.name is None:
                word = short(arg.value.span.text)
                help = (f"write `{legal[0]}={word}`, or another of its fields",) if legal else ()
                message = f"arguments of {owner} have names"
                self.report(Diagnostic(E043, message, arg.value.span, "which field is this?", help=help))
            elif legal is not None and arg.name.text not in legal:
                self.report(unknown(E022, arg.name, owner, legal))
            elif arg.name.text in found:
                first = Label(found[arg.name.text].key, "first here")
                message = f"`{arg.name.text}` is given twice"
                self.report(Diagnostic(E042, message, arg.name.span, labels=(first,)))
            else:
                found[arg.name.text] = Given(value, arg.name.span, arg.value.span, scope)
        return found

    def _use(self, recipe: Recipe, span: Span) -> Use | None:
        layer = filled(recipe, model=self.model, report=self.report)
        if layer is None:
            return None
        self._recipes[id(layer)] = (recipe, layer)
        return Use(layer, span)

    def _recipe(self, use: Use) -> Recipe:
        return self._recipes[id(use.layer)][0]


def no_kind(name: str, place: Span) -> Diagnostic:
    near = nearest(name, registry.names())
    help = f"did you mean `{near}`?" if near else "kinds: " + ", ".join(registry.names())
    return Diagnostic(codes.E021, f"there is no kind `{short(name)}`", place, "unknown kind", help=(help,))


def short(word: str) -> str:
    """A word that may be absurdly long."""
    return word if len(word) <= 40 else word[:37] + "..."


def _blocks(elements: tuple[Element, ...]) -> Iterator[Block]:
    """All blocks, each once however often it is used."""
    seen: set[int] = set()
    todo = list(elements)
    while todo:
        element = todo.pop()
        if isinstance(element, Block) and id(element.items) not in seen:
            seen.add(id(element.items))
            yield element
            todo += element.items


def layers_of(element: Element) -> Iterator[Use]:
    """The layers of an element, each place of the text once."""
    if isinstance(element, Use):
        yield element
    for block in _blocks((element,)):
        yield from (item for item in block.items if isinstance(item, Use))


def _uses_in(item: tree.Item) -> Iterator[tree.Use]:
    """The layers that an item is made of, by name."""
    todo: list[tree.Node] = [item]
    while todo:
        match todo.pop():
            case tree.Use() as use:
                yield use
            case tree.Group(pattern=pattern):
                todo += reversed(pattern.items)
            case tree.Repeat(item=inner):
                todo.append(inner)
            case tree.Parallel(branches=branches):
                todo += reversed(branches)
