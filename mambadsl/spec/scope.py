"""What names mean inside one file: constants, layers, imports; model settings behind them.

`let` names belong to their file; settings belong to the model being compiled, so an imported layer
scales with it. Constants and settings are computed when first asked for, with circles refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from mambadsl.kinds.fields import Call, Field, Mismatch, Word
from mambadsl.kinds.values import Variant
from mambadsl.spec.order import Circle, circle, in_order
from mambadsl.spec.values import Problem, evaluate
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label, declare

E024 = declare(
    "E024",
    "a name is declared twice",
    """
    In one file a name means one thing: a constant, a layer, or something imported. The second
    declaration is marked; rename one of the two. (Layers of the shipped `std.mdl` may be declared anew.)

    Shared items are one name for the whole model, since their weights are named by it: two files that
    take part in one model cannot both declare `shared S`.
    """,
)
E025 = declare(
    "E025",
    "a definition refers to itself",
    """
    A constant, a setting or a layer is defined by itself, directly or through others, so it has no value.
    """,
)


@dataclass(frozen=True)
class Imported:
    """A name of another file; `name` is where it is imported."""

    scope: FileScope
    name: tree.Name


class FileScope:
    """Names of one file. `report` takes what is wrong with the declarations themselves. broken: imported
    names that are not there, with the problem; it was reported, and is repeated where they are used."""

    def __init__(self, file: tree.File, constants: Constants, report: Callable[[Diagnostic], None]):
        self.file, self.constants = file, constants
        self.lets: dict[str, tree.Let] = {}
        self.layers: dict[str, tree.Layer] = {}
        self.imports: dict[str, Imported] = {}
        self.broken: dict[str, Diagnostic] = {}
        declared: dict[str, tree.Name] = {}
        for statement in file.statements:
            for name in _declares(statement):
                if name.text in declared:
                    first = Label(declared[name.text].span, "first declared here")
                    message = f"`{name.text}` is declared twice"
                    report(Diagnostic(E024, message, name.span, "again here", (first,)))
                    continue
                declared[name.text] = name
                if isinstance(statement, tree.Let):
                    self.lets[name.text] = statement
                elif isinstance(statement, tree.Layer):
                    self.layers[name.text] = statement

    def lookup(self, name: tree.Name) -> Any:
        """The raw value of a constant, an imported constant or a setting; None for any other word."""
        return self.constants.value(self, name.text)

    def constant(self, name: str) -> bool:
        """Whether the name is a constant, of this file or imported."""
        return name in self.lets or name in self.imports

    def names(self) -> list[str]:
        """Every name that has a value here, for suggestions."""
        return [*self.lets, *(n for n in self.imports if n[0].islower()), *self.constants.fields]

    def declared(self) -> list[str]:
        """What others can import from here."""
        return [*self.layers, *self.lets, *self.imports]


def _declares(statement: tree.Statement) -> tuple[tree.Name, ...]:
    match statement:
        case tree.Let() | tree.Layer():
            return (statement.name,)
        case tree.Import():
            return statement.names
    return ()


#: A constant of a file, or a setting of the model (no scope).
_Key: TypeAlias = "tuple[FileScope | None, str]"


class Constants:
    """Values of the constants of all files and of the model's settings, each computed once.

    fields: the settings there are; given: those that the main file gives. `main` is set once its scope is
    made (scopes need the constants)."""

    main: FileScope

    def __init__(self, fields: tuple[Field, ...], given: dict[str, tree.Setting]):
        self.fields = {f.name: f for f in fields}
        self.given = given
        self._values: dict[_Key, Any] = {}

    def value(self, scope: FileScope, text: str) -> Any:
        """What a word means in a file: a raw value, or None. Raises Problem where it has none."""
        key = self._home(scope, text)
        if key is not None:
            return self.setting(text) if key[0] is None else self._computed(key)
        return raw(self.fields[text].default) if text in self.fields else None

    def written(self, setting: str) -> Any:
        """A setting as it was given, which need not fit its field."""
        return self._computed((None, setting))

    def setting(self, name: str) -> Any:
        """What a given setting means in expressions: the default where it does not fit. (That is one
        problem, reported with the model block, not one in every use.)"""
        written = self.written(name)
        try:
            self.fields[name].type.convert(written)
        except Mismatch:
            return raw(self.fields[name].default)
        return written

    def _home(self, scope: FileScope, text: str) -> _Key | None:
        while text not in scope.lets:
            if text in scope.broken:
                raise Problem(scope.broken[text])
            if text not in scope.imports:
                return (None, text) if text in self.given else None
            scope = scope.imports[text].scope
        return scope, text

    def _computed(self, key: _Key) -> Any:
        while key not in self._values:
            try:
                for each in in_order(key, needs=self._needs, done=self._values.__contains__):
                    self._compute(each)
            except Circle as found:
                names = [self._definition(k).name for k in found.keys]
                problem = Problem(circle(E025, names, built="defined by"))
                self._values.update(dict.fromkeys(found.keys, problem))
        value = self._values[key]
        if isinstance(value, Problem):
            raise value
        return value

    def _compute(self, key: _Key) -> None:
        try:
            self._values[key] = evaluate(self._definition(key).value, key[0] or self.main)
        except Problem as problem:
            self._values[key] = problem

    def _definition(self, key: _Key) -> tree.Let | tree.Setting:
        scope, text = key
        return scope.lets[text] if scope else self.given[text]

    def _needs(self, key: _Key) -> Iterator[_Key]:
        for name in _words(self._definition(key).value):
            try:
                other = self._home(key[0] or self.main, name.text)
            except Problem:
                continue  # comes up again when the value is computed
            if other is not None:
                yield other


def _words(value: tree.Value) -> Iterator[tree.Name]:
    """The words of an expression that may be constants."""
    todo = [value]
    while todo:
        match todo.pop():
            case tree.Term(args=None) as term:
                yield term.name
            case tree.Term(args=args) | tree.Use(args=args):
                todo += [arg.value for arg in args or ()]
            case tree.List(items=items):
                todo += items
            case tree.Binary(left=left, right=right):
                todo += [left, right]
            case tree.Paren(value=inner) | tree.Negative(value=inner):
                todo.append(inner)


def raw(value: Any) -> Any:
    """A typed value as the language's raw value (the reverse of a field type's `convert`; None stays None,
    which `OrWord` takes for its word)."""
    match value:
        case bool():
            return value
        case int():
            return Fraction(value)
        case float():
            return Fraction(repr(value))
        case str():
            return Word(value)
        case tuple() | list():
            return [raw(item) for item in value]
        case Variant():
            return Call(value.name, {k: raw(v) for k, v in value.values.items()})
    return value
