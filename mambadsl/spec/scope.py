"""What names mean inside one file: constants, layers, imports; model settings behind them.

`let` names belong to their file; settings belong to the model being compiled, so an imported layer
scales with it. Constants and settings are computed when first asked for, with circles refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mambadsl.kinds.fields import Call, Field, Mismatch, Word
from mambadsl.kinds.values import Variant
from mambadsl.spec.values import Problem, evaluate
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label, declare
from mambadsl.text.source import Span

E024 = declare(
    "E024",
    "a name is declared twice",
    """
    In one file a name means one thing: a constant, a layer, or something imported. The second
    declaration is marked; rename one of the two. (Layers of the shipped `std.mdl` may be declared anew.)
    """,
)
E025 = declare(
    "E025",
    "a definition refers to itself",
    """
    A constant, a setting or a layer is defined by itself, directly or through others, so it has no value.
    """,
)


#: How far a constant may lie from its numbers; real files need two or three steps.
MAX_CHAIN = 64


class Settings:
    """The model's settings as raw values, computed when asked for. `given`: tree settings by name."""

    def __init__(self, fields: tuple[Field, ...], given: dict[str, tree.Setting]):
        self.fields = {f.name: f for f in fields}
        self.given = given
        self.scope: FileScope | None = None
        self._written: dict[str, Any] = {}
        self._open: list[tree.Name] = []

    def written(self, name: str) -> Any:
        """The value as it was given, which need not fit its field."""
        if name not in self._written:
            setting = self.given[name]
            with _computing(self._open, setting.name):
                self._written[name] = evaluate(setting.value, self.scope)
        return self._written[name]

    def raw(self, name: str) -> Any:
        """What the name means in expressions: the given value, or the default where none was given or it
        does not fit. (That is one problem, reported with the model block, not one in every use.)"""
        field = self.fields[name]
        if name not in self.given:
            return raw(field.default)
        try:
            field.type.convert(self.written(name))
        except Mismatch:
            return raw(field.default)
        return self.written(name)


@dataclass
class Imported:
    """A name of another file."""

    scope: FileScope
    name: tree.Name


class FileScope:
    """Names of one file. `problems` takes what is wrong with the declarations themselves."""

    def __init__(self, file: tree.File, settings: Settings, problems: list[Diagnostic]):
        self.file, self.settings = file, settings
        self.lets: dict[str, tree.Let] = {}
        self.layers: dict[str, tree.Layer] = {}
        self.imports: dict[str, Imported] = {}
        self._values: dict[str, Any] = {}
        self._open: list[tree.Name] = []
        declared: dict[str, Span] = {}
        for statement in file.statements:
            names = {
                tree.Let: lambda s: (s.name,), tree.Layer: lambda s: (s.name,), tree.Import: lambda s: s.names
            }.get(type(statement), lambda s: ())(statement)
            for name in names:
                if name.text in declared:
                    first = Label(declared[name.text], "first declared here")
                    problems.append(
                        Diagnostic(E024, f"`{name.text}` is declared twice", name.span, "again here", (first,))
                    )
                    continue
                declared[name.text] = name.span
                if isinstance(statement, tree.Let):
                    self.lets[name.text] = statement
                elif isinstance(statement, tree.Layer):
                    self.layers[name.text] = statement

    def lookup(self, name: tree.Name) -> Any:
        text = name.text
        if text in self.lets:
            if text not in self._values:
                let = self.lets[text]
                with _computing(self._open, let.name):
                    self._values[text] = evaluate(let.value, self)
            return self._values[text]
        if text in self.imports:
            there = self.imports[text]
            return there.scope.lookup(there.name)
        if text in self.settings.fields:
            return self.settings.raw(text)
        return None

    def names(self) -> list[str]:
        """Every name that has a value here, for suggestions."""
        return [*self.lets, *(n for n in self.imports if n[0].islower()), *self.settings.fields]


@contextmanager
def _computing(open_: list[tree.Name], name: tree.Name) -> Iterator[None]:
    """Refuses a name that is being computed already."""
    if any(o.span == name.span for o in open_):
        places = tuple(Label(o.span, f"needs `{o.text}`") for o in open_ if o.span != name.span)
        raise Problem(Diagnostic(E025, f"`{name.text}` is defined by itself", name.span, "a circle", places))
    if len(open_) >= MAX_CHAIN:
        message = f"constants are built from one another more than {MAX_CHAIN} deep"
        raise Problem(Diagnostic(E025, message, name.span))
    open_.append(name)
    try:
        yield
    finally:
        open_.pop()


def raw(value: Any) -> Any:
    """A typed value as the language's raw value (the reverse of a field type's `convert`)."""
    match value:
        case bool():
            return value
        case int():
            return Fraction(value)
        case float():
            return Fraction(repr(value))
        case None:
            return Word("none")
        case str():
            return Word(value)
        case tuple() | list():
            return [raw(item) for item in value]
        case Variant():
            return Call(value.name, {k: raw(v) for k, v in value.values.items()})
    return value
