"""Names and patterns -> elements: layers with all their fields, blocks kept folded.

A layer that is wrong is reported once, where it is declared, and stands as None: its uses are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mambadsl.kinds import registry
from mambadsl.kinds.kind import Kind
from mambadsl.kinds.sublayer import BRANCH_FIELDS, PER_USE_FIELDS, SUBLAYER_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec import codes
from mambadsl.spec.fill import E022, Given, fill, unknown
from mambadsl.spec.model import Block, Cut, Element, LayerSpec, Mixer, Use
from mambadsl.spec.scope import E025, FileScope
from mambadsl.spec.scopes import Scopes
from mambadsl.spec.values import E042, E043, Problem, evaluate
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label
from mambadsl.text.source import Span
from mambadsl.text.spell import nearest, split_layers

_SUB = tuple(f.name for f in SUBLAYER_FIELDS)
_BRANCH = tuple(f.name for f in BRANCH_FIELDS)
_FAILED = object()


@dataclass(frozen=True)
class _Recipe:
    """A layer before its defaults: what was given, so that a changed copy can be filled anew."""

    branches: tuple[tuple[Kind, dict[str, Given]], ...]
    sub: dict[str, Given]
    names: tuple[str | None, ...]
    chain: tuple[Span, ...]
    name: str | None = None


class Layers:
    """All layers of one model. model: its settings, filled."""

    def __init__(self, scopes: Scopes, model: Values, report: Callable[[Diagnostic], None]):
        self.scopes, self.model, self.report = scopes, model, report
        self._elements: dict[tuple[int, str], Element | None] = {}
        self._open: list[tuple[int, str, Span]] = []
        #: By identity of the layer; it is kept here, so that no other can get its id.
        self._recipes: dict[int, tuple[_Recipe, LayerSpec]] = {}

    def layer(self, scope: FileScope, name: str, *, at: Span | None = None) -> Element | None:
        """What a layer name means in a file: an element, or None where that is reported already."""
        if name in scope.imports:
            there = scope.imports[name].scope
            return self.layer(there, name, at=at)
        if name not in scope.layers:
            return self._std_layer(scope, name, at)
        key = (id(scope), name)
        if key not in self._elements:
            definition = scope.layers[name]
            if any(o[:2] == key for o in self._open):
                places = tuple(Label(s, f"`{n}` is defined here") for _, n, s in self._open[1:])
                span = definition.name.span
                self.report(Diagnostic(E025, f"`{name}` is built from itself", span, "a circle", places))
                return None
            if len(self._open) >= codes.MAX_DEPTH:
                message = f"layers are built from one another more than {codes.MAX_DEPTH} deep"
                self.report(Diagnostic(codes.E047, message, definition.name.span))
                return None
            self._open.append((*key, definition.name.span))
            self._elements[key] = self._definition(definition, scope)
            self._open.pop()
        return self._elements[key]

    def _std_layer(self, scope: FileScope, name: str, at: Span | None) -> Element | None:
        std = self.scopes.std()
        if std is not scope and name in std.layers:
            return self.layer(std, name, at=at)
        legal = [*scope.layers, *(n for n in scope.imports if n[0].isupper())]
        usual = [n for n in std.layers if n not in legal]
        split = split_layers(name, {*legal, *usual})
        near = nearest(name, legal)
        if split:
            help = f"did you mean `{split}`? Layers are separated by spaces"
        elif near:
            help = f"did you mean `{near}`?"
        elif legal:
            help = "layers here: " + ", ".join(legal) + (f"; and from std.mdl: {', '.join(usual)}" if usual else "")
        else:
            help = f"declare it: `layer {name} = mamba2(...)`; std.mdl has {', '.join(usual)}"
        self.report(Diagnostic(codes.E020, f"there is no layer `{name}`", at, "unknown layer", help=(help,)))
        return None

    def _definition(self, definition: tree.Layer, scope: FileScope) -> Element | None:
        name = definition.name.text
        element = self.item(definition.item, scope)
        if element is None:
            return None
        if definition.shared:
            for cut in _cuts((element,)):
                self.report(Diagnostic(codes.E046, "a shared item is used whole; no `|` in it", cut.span))
            return self._block(definition.span, (element,), shared=name, name=name)
        if isinstance(element, Use):
            recipe = self._recipes[id(element.layer)][0]
            return self._use(replace(recipe, name=name, chain=(*recipe.chain, definition.name.span)), definition.span)
        if isinstance(element, Block) and not element.shared and element.name is None:
            return replace(element, name=name)
        return self._block(definition.span, (element,), name=name)

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
            message = "a repeat is at least 1"
            self.report(Diagnostic(codes.E047, message, node.count_span, f"{node.count} times", help=("leave it out",)))
            return None
        element = self.item(node.item, scope)
        if element is None:
            return None
        if isinstance(element, Block) and element.count == 1 and element.shared is None and element.name is None:
            return self._block(node.span, element.items, count=node.count)
        return self._block(node.span, (element,), count=node.count)

    def _block(self, span: Span, items: tuple[Element, ...], **more) -> Block | None:
        """A block within bounds; so nothing that walks blocks can take long."""
        block = Block(items, span=span, **more)
        if block.layers == 0:
            self.report(Diagnostic(codes.E049, "this block has no layers, only cuts", span))
            return None
        if block.layers > codes.MAX_LAYERS:
            message = f"this lays out {codes.short_count(block.layers)} layers; a model has at most {codes.MAX_LAYERS:,}"
            self.report(Diagnostic(codes.E047, message, span))
            return None
        if block.depth > codes.MAX_DEPTH:
            message = f"blocks stand inside one another more than {codes.MAX_DEPTH} deep"
            self.report(Diagnostic(codes.E047, message, span))
            return None
        return block

    def _kind(self, node: tree.Term, scope: FileScope) -> Element | None:
        name = node.name.text
        if name not in registry.names():
            near = nearest(name, registry.names())
            help = (f"did you mean `{near}`?",) if near else ("kinds: " + ", ".join(registry.names()),)
            self.report(Diagnostic(codes.E021, f"there is no kind `{name}`", node.name.span, "unknown kind", help=help))
            return None
        kind = registry.get(name)
        legal = [f.name for f in kind.fields] + [*_SUB, *_BRANCH]
        given = self.arguments(node.args or (), scope, f"`{name}`", legal)
        sub = {k: g for k, g in given.items() if k in _SUB}
        rest = {k: g for k, g in given.items() if k not in _SUB}
        return self._use(_Recipe(((kind, rest),), sub, (None,), (node.span,)), node.span)

    def _named(self, node: tree.Use, scope: FileScope) -> Element | None:
        name = node.name.text
        element = self.layer(scope, name, at=node.name.span)
        if element is None:
            for arg in node.args or ():
                self.value(arg.value, scope)
            return None
        if not node.args:
            return replace(element, span=node.span)
        if isinstance(element, Block) and element.shared:
            return self._per_use(node, element, scope)
        if not isinstance(element, Use):
            self.report(Diagnostic(
                codes.E044, f"`{name}` is a block; a field can be changed in a single layer only", node.span,
                "a block cannot be reached into", help=("change the layer inside, or write a block of its own",),
            ))
            return None
        recipe = self._recipes[id(element.layer)][0]
        if len(recipe.branches) > 1:
            given = self.arguments(node.args, scope, f"the sum `{name}`", list(_SUB))
            changed = replace(recipe, sub={**recipe.sub, **given}, chain=(*recipe.chain, node.span), name=None)
            return self._use(changed, node.span)
        kind, before = recipe.branches[0]
        legal = [f.name for f in kind.fields] + [*_SUB, *_BRANCH]
        given = self.arguments(node.args, scope, f"`{name}` (a `{kind.name}`)", legal)
        sub = {**recipe.sub, **{k: g for k, g in given.items() if k in _SUB}}
        rest = {**before, **{k: g for k, g in given.items() if k not in _SUB}}
        chain = (*recipe.chain, node.span)
        names = (recipe.name or recipe.names[0],)
        changed = replace(recipe, branches=((kind, rest),), sub=sub, chain=chain, names=names, name=None)
        return self._use(changed, node.span)

    def _per_use(self, node: tree.Use, block: Block, scope: FileScope) -> Element | None:
        """A shared item at one use: only fields that are not part of its weights may change."""
        name = node.name.text
        for arg in node.args:
            if arg.name is not None and arg.name.text not in PER_USE_FIELDS:
                self.report(Diagnostic(
                    codes.E046, f"`{name}` is shared: every use has the same weights and fields", arg.name.span,
                    "cannot differ from use to use", help=("only `adapter` may; or declare another `layer`",),
                ))
                return None
        given = self.arguments(node.args, scope, f"the shared `{name}`", list(PER_USE_FIELDS))
        return replace(self._changed(block, given), span=node.span)

    def _changed(self, element: Element, given: dict[str, Given]) -> Element:
        if isinstance(element, Block):
            return replace(element, items=tuple(self._changed(e, given) for e in element.items))
        if isinstance(element, Use):
            recipe = self._recipes[id(element.layer)][0]
            branches = tuple((kind, {**before, **given}) for kind, before in recipe.branches)
            names = (recipe.name,) if recipe.name and len(branches) == 1 else recipe.names
            return self._use(replace(recipe, branches=branches, names=names, name=None), element.span) or element
        return element

    def _parallel(self, node: tree.Parallel, scope: FileScope) -> Element | None:
        recipes: list[_Recipe] = []
        fine = True
        for branch in node.branches:
            element = self.item(branch, scope)
            if element is None:
                fine = False
            elif isinstance(element, Use):
                recipes.append(self._recipes[id(element.layer)][0])
            else:
                fine = False
                shared = isinstance(element, Block) and element.shared
                what = "a shared layer" if shared else "a block"
                self.report(Diagnostic(
                    codes.E045, "a sum joins single layers", branch.span, f"this is {what}",
                    help=(("share the sum instead: `shared S = M + A`",) if shared else ()),
                ))
        if not fine:
            return None
        sub: dict[str, Given] = {}
        for recipe in recipes:
            for key, g in recipe.sub.items():
                if key in sub and sub[key].value != g.value:
                    other = Label(sub[key].place, "and here another")
                    message = f"the branches of a sum share one `{key}`"
                    self.report(Diagnostic(codes.E045, message, g.place, "given here", (other,)))
                    return None
                sub.setdefault(key, g)
        branches = tuple(b for r in recipes for b in r.branches)
        names = tuple(n for r in recipes for n in (r.names if len(r.branches) > 1 else (r.name or r.names[0],)))
        chain = tuple(s for r in recipes for s in r.chain)
        return self._use(_Recipe(branches, sub, names, (*chain, node.span)), node.span)

    # -- values

    def value(self, value: tree.Value, scope: FileScope):
        """The raw value of an expression; a mark that fits nothing where it has none (reported)."""
        try:
            return evaluate(value, scope)
        except Problem as problem:
            self.report(problem.diagnostic)
            return _FAILED

    def arguments(
        self, args: tuple[tree.Arg, ...], scope: FileScope, owner: str, legal: list[str] | None
    ) -> dict[str, Given]:
        found: dict[str, Given] = {}
        for arg in args:
            if arg.name is None:
                word = arg.value.span.text
                help = (f"write `{legal[0]}={word}`, or another of its fields",) if legal else ()
                message = f"arguments of {owner} have names"
                self.report(Diagnostic(E043, message, arg.value.span, "which field is this?", help=help))
                continue
            key = arg.name
            if legal is not None and key.text not in legal:
                self.report(unknown(E022, key, owner, legal))
                self.value(arg.value, scope)
            elif key.text in found:
                first = Label(found[key.text].key, "first here")
                self.report(Diagnostic(E042, f"`{key.text}` is given twice", key.span, labels=(first,)))
            else:
                value = self.value(arg.value, scope)
                found[key.text] = Given(value, key.span, arg.value.span)
        return found

    def _use(self, recipe: _Recipe, span: Span) -> Use | None:
        """Fills the fields of a recipe; None where one did not fit (reported)."""
        names = self.scopes.settings.scope.names()
        all_given = [*recipe.sub.values(), *(g for _, b in recipe.branches for g in b.values())]
        if any(g.value is _FAILED for g in all_given):
            return None
        sub, sub_origins, fine = fill(
            SUBLAYER_FIELDS, recipe.sub, model=self.model, report=self.report, names=names
        )
        mixers = []
        for (kind, given), name in zip(recipe.branches, recipe.names):
            kind_given = {k: g for k, g in given.items() if k not in _BRANCH}
            branch_given = {k: g for k, g in given.items() if k in _BRANCH}
            values, origins, ok1 = fill(kind.fields, kind_given, model=self.model, report=self.report, names=names)
            branch, more, ok2 = fill(BRANCH_FIELDS, branch_given, model=self.model, report=self.report, names=names)
            fine = fine and ok1 and ok2
            own = recipe.name if len(recipe.branches) == 1 and recipe.name else name
            mixers.append(Mixer(kind.name, values, branch, own, recipe.chain[0], {**origins, **more}, recipe.chain))
        if not fine:
            return None
        layer = LayerSpec(tuple(mixers), sub, recipe.name, recipe.chain[-1], sub_origins)
        self._recipes[id(layer)] = (recipe, layer)
        return Use(layer, span)


def uses(element: Element) -> Iterator[Use]:
    if isinstance(element, Use):
        yield element
    elif isinstance(element, Block):
        for item in element.items:
            yield from uses(item)


def _cuts(elements: tuple[Element, ...]) -> Iterator[Cut]:
    for element in elements:
        if isinstance(element, Cut):
            yield element
        elif isinstance(element, Block):
            yield from _cuts(element.items)
