"""The Python door to the same language: what is built here is a file's tree, resolved like any other.

    g = Graph("toy", vocab=256, d_model=64)
    M = g.layer("M", "mamba2", head_dim=16)
    A = g.layer("A", "attention", heads=4, rope=form("rope", theta=1e6))
    g.stack([M, A] * 2, M + A, g.cut, A(window=8))
    program = g.compile()

Same defaults, same checks, same graph; errors point at the Python line that gave the value.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mambadsl.spec.codes import MAX_DEPTH
from mambadsl.spec.emit import LAYER_NAME
from mambadsl.spec.model import is_name, name_of
from mambadsl.syntax import build, tree
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import Source, Span

E061 = declare(
    "E061",
    "a name that the language does not have",
    """
    Layers that are built in Python have names as in text: an upper-case letter, then letters, digits and `_`.
    Names of models are lower-case and no keyword. So every model that was built can be written.
    """,
)


class Item:
    """Something a pattern can hold: a layer, a sum, a repeat, a group. graph: whose layers it names."""

    def __init__(self, node: tree.Item, graph: Graph):
        self.node, self.graph = node, graph

    def __call__(self, **fields: Any) -> Item:
        """A changed copy: A(window=4096)."""
        span = _here()
        if not isinstance(self.node, tree.Use):
            raise TypeError("only a named layer can be changed")
        return Item(replace(self.node, args=_args(fields, span), span=span), self.graph)

    def __add__(self, other: Item) -> Item:
        """In parallel: M + A."""
        span = _here()
        units = (tree.Use, tree.Term, tree.Group)
        if not isinstance(other, Item) or not isinstance(other.node, units):
            return NotImplemented
        self.graph._owns(other)
        if isinstance(self.node, units):
            return Item(tree.Parallel((self.node, other.node), span=span), self.graph)
        if isinstance(self.node, tree.Parallel):
            return Item(tree.Parallel((*self.node.branches, other.node), span=span), self.graph)
        return NotImplemented

    def __mul__(self, count: int) -> Item:
        """Repeated: M * 3."""
        span = _here()
        inner = self.node
        if not isinstance(count, int) or isinstance(count, bool) or isinstance(inner, tree.Cut):
            return NotImplemented
        if isinstance(inner, (tree.Repeat, tree.Parallel)):
            inner = tree.Group(tree.Pattern((inner,), span=span), span=span)
        return Item(tree.Repeat(inner, count, span, span=span), self.graph)

    __rmul__ = __mul__


class Form:
    def __init__(self, name: str, fields: dict[str, Any], span: Span):
        self.name, self.fields, self.span = name, fields, span


def form(name: str, **fields: Any) -> Form:
    """A form with fields of its own, as a value: form("rope", theta=1e6)."""
    return Form(name, fields, _here())


class Graph:
    """A model in the making. Settings are the model block's; patterns take items and lists of items."""

    def __init__(self, name: str = "a_model", **settings: Any):
        span = _here()
        if not isinstance(name, str):
            raise TypeError(f"a model's name is text, not {type(name).__name__}")
        if not is_name(name):
            help = (f"for instance `{name_of(name)}`",)
            raise MdlError([Diagnostic(E061, f"`{name}` is no name for a model", span, help=help)])
        given = tuple(
            tree.Setting(tree.Name(key, span=span), _value(value, span), span=span)
            for key, value in settings.items()
        )
        model = tree.Model(tree.Name(name, span=span), given, span=span)
        self._statements: list[tree.Statement] = [model]
        self._source = span.source

    @property
    def cut(self) -> Item:
        """`|`: a pipeline stage ends here."""
        return Item(tree.Cut(span=_here()), self)

    def layer(self, name: str, kind: str | Item | list, **fields: Any) -> Item:
        """Declares a layer: of a kind with fields, or an item (a block, a sum, a changed layer)."""
        return self._declare(name, kind, fields, shared=False)

    def shared(self, name: str, kind: str | Item | list, **fields: Any) -> Item:
        """Declares one instance: every use has the same weights."""
        return self._declare(name, kind, fields, shared=True)

    def stack(self, *items: Item | Iterable) -> None:
        span = _here()
        self._statements.append(tree.Stack(self._pattern(items, span), span=span))

    def mtp(self, *items: Item | Iterable, **settings: Any) -> None:
        span = _here()
        self._statements.append(tree.Mtp(_args(settings, span) or (), self._pattern(items, span), span=span))

    def expect(self, fact: str, op: str, value: Any) -> None:
        """A fact to check: expect("layers", "==", 52)."""
        span = _here()
        if op not in ("==", "!=", "<=", ">=", "<", ">"):
            raise ValueError(f"facts are compared by == != <= >= < >, not {op!r}")
        left = tree.Term(tree.Name(fact, span=span), span=span)
        self._statements.append(tree.Expect(left, op, _value(value, span), span=span))

    def file(self) -> tree.File:
        """The tree, as if it had been read."""
        return tree.File(self._source, tuple(self._statements))

    def compile(self, **how: Any) -> Any:
        """A checked Program (see `mambadsl.load` for the keywords). Raises MdlError."""
        from mambadsl.compile import compile_file

        return compile_file(self.file(), **how)

    def _declare(self, name: str, kind: str | Item | list, fields: dict[str, Any], *, shared: bool) -> Item:
        span = _here()
        if not LAYER_NAME.fullmatch(name):
            help = ("an upper-case letter, then letters, digits and `_`",)
            raise MdlError([Diagnostic(E061, f"`{name}` is no name for a layer", span, help=help)])
        if isinstance(kind, str):
            item: tree.Item = tree.Term(tree.Name(kind, span=span), _args(fields, span) or (), span=span)
        else:
            item = self._item(kind, span)
            if fields:
                if not isinstance(item, tree.Use):
                    raise TypeError("fields go with a kind or a named layer")
                item = replace(item, args=_args(fields, span))
        self._statements.append(tree.Layer(tree.Name(name, span=span), item, shared, span=span))
        return Item(tree.Use(tree.Name(name, span=span), span=span), self)

    def _pattern(self, items: Iterable, span: Span, *, depth: int = 0) -> tree.Pattern:
        if depth > MAX_DEPTH:
            raise ValueError(f"lists stand inside one another more than {MAX_DEPTH} deep")
        nodes = tuple(self._item(item, span, depth=depth) for item in items)
        if not nodes:
            raise ValueError("an empty list is no pattern")
        return tree.Pattern(nodes, span=span)

    def _item(self, item: Any, span: Span, *, depth: int = 0) -> tree.Item:
        if isinstance(item, Item):
            self._owns(item)
            return item.node
        if isinstance(item, (list, tuple)):
            return tree.Group(self._pattern(item, span, depth=depth + 1), span=span)
        raise TypeError(f"a pattern holds layers and lists of layers, not {type(item).__name__}")

    def _owns(self, item: Item) -> None:
        """A name of another Graph would mean something else here."""
        if item.graph is not self:
            raise ValueError("this layer belongs to another Graph; declare it in this one")


def _args(fields: dict[str, Any], span: Span) -> tuple[tree.Arg, ...] | None:
    args = (tree.Arg(tree.Name(k, span=span), _value(v, span), span=span) for k, v in fields.items())
    return tuple(args) or None


def _value(value: Any, span: Span) -> tree.Value:
    if isinstance(value, Form):
        args = _args(value.fields, value.span) or ()
        return tree.Term(tree.Name(value.name, span=value.span), args, span=value.span)
    if isinstance(value, (list, tuple)):
        return tree.List(tuple(_value(v, span) for v in value), span=span)
    if isinstance(value, float) and not math.isfinite(value):
        if value != math.inf:
            raise ValueError(f"{value} is no value of a field")
        value = "inf"
    return replace(build.value(value), span=span)


_sources: dict[str, Source] = {}


def _here() -> Span:
    """The line of the user's Python file that is being run."""
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    name, line = frame.f_code.co_filename, frame.f_lineno
    if name not in _sources:
        _sources[name] = Source(name, "".join(linecache.getlines(name)))
    source = _sources[name]
    if not source.text or line > len(source.line_starts):
        return Span(source, 0, 0)
    text = source.line_text(line)
    start = source.line_starts[line - 1] + len(text) - len(text.lstrip())
    return Span(source, start, source.line_starts[line - 1] + len(text.rstrip()))


