"""Expressions -> raw values, exactly. Numbers are Fractions: 4096 / 24 is 512/3, never 170.67.

A scope says what names mean: `scope.lookup(name)` returns a raw value, or None where the name means
nothing there (then it is a bare word, such as `relu2`). Problems are `Problem`s carrying a Diagnostic.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Protocol

from mambadsl.kinds.fields import Call, Word, show
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Diagnostic, Label, declare
from mambadsl.text.spell import nearest

#: Bounds on any number on the way, and on the parts of a list or a form, so that nothing grows without limit.
MAX_NUMBER, MAX_PARTS = 10**30, 1000

E040 = declare(
    "E040",
    "a value does not fit its field",
    """
    Every field has a type: a whole number, a number, `true` or `false`, one word of a list, a form with
    fields of its own, or a list. The message says what the field takes and what was found; the types of
    all fields of a kind are printed by `mambadsl explain KIND`.

    Numbers are exact. `d_ff = 4096 / 24` is 512/3 and no whole number, so it is refused; write `//` to
    round down, or `round_up(4096 // 24, 64)`.
    """,
)
E041 = declare(
    "E041",
    "an expression cannot be computed",
    """
    Arithmetic (`+ - * / //`) is for numbers; nothing divides by zero; results stay below 1e30, and are
    fractions of numbers below 1e30 (they are exact, and would grow without limit). Functions are
    `round_up(x, multiple)`, `min(...)` and `max(...)`. Lists and forms have at most 1,000 parts in all.
    """,
)
E042 = declare(
    "E042",
    "a field is given twice",
    """
    One call gives each field at most once. To change a field of a named layer, give it at the use:
    `A(window=4096)`.
    """,
)
E043 = declare(
    "E043",
    "an argument needs a name",
    """
    Arguments are written `name=value`, in any order: `mamba2(heads=128, d_state=128)`. Only functions
    (`round_up`, `min`, `max`) take values without names.
    """,
)


class Problem(Exception):
    """One diagnostic on its way to the stage that collects them."""

    def __init__(self, diagnostic: Diagnostic):
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


class Scope(Protocol):
    def lookup(self, name: tree.Name) -> Any: ...

    def names(self) -> list[str]: ...


def evaluate(node: tree.Value, scope: Scope) -> Any:
    """The raw value of an expression (see kinds.fields)."""
    match node:
        case tree.Number():
            return node.value
        case tree.Bool() | tree.String():
            return node.value
        case tree.Paren():
            return evaluate(node.value, scope)
        case tree.List():
            return _small([evaluate(item, scope) for item in node.items], node)
        case tree.Negative():
            return -_number(node.value, scope)
        case tree.Binary():
            return _binary(node, scope)
        case tree.Term(args=None):
            value = scope.lookup(node.name)
            return Word(node.name.text) if value is None else value
        case tree.Term():
            function = FUNCTIONS.get(node.name.text)
            return function(node, scope) if function else _small(call(node.name.text, node.args, scope), node)
        case tree.Use():
            message = f"the layer `{node.name.text}` is not a value"
            raise Problem(Diagnostic(E040, message, node.span, "no field takes a layer"))
    raise TypeError(type(node).__name__)


def _small(value: Any, node: tree.Node) -> Any:
    """The value, if it has few parts: constants in constants would make it grow like 2**n."""
    todo, parts = [value], 0
    while todo:
        part = todo.pop()
        inner = part if isinstance(part, list) else part.args.values() if isinstance(part, Call) else ()
        todo += inner
        parts += len(inner)
        if parts > MAX_PARTS:
            raise Problem(Diagnostic(E041, f"the value has more than {MAX_PARTS:,} parts", node.span))
    return value


def call(name: str, args: tuple[tree.Arg, ...], scope: Scope) -> Call:
    """A form with named arguments, evaluated; keeps the nodes as places."""
    found: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    places: dict[str, Any] = {}
    for arg in args:
        key = named(arg, name)
        if key.text in found:
            again = Label(keys[key.text].span, "first here")
            raise Problem(Diagnostic(E042, f"`{key.text}` is given twice", key.span, labels=(again,)))
        keys[key.text], places[key.text] = key, arg.value
        found[key.text] = evaluate(arg.value, scope)
    return Call(name, found, keys, places)


def named(arg: tree.Arg, owner: str) -> tree.Name:
    if arg.name is None:
        raise Problem(
            Diagnostic(
                E043, f"arguments of `{owner}` have names", arg.value.span, "which field is this?",
                help=(f"write `name={arg.value.span.text}`",),
            )
        )
    return arg.name


def _number(node: tree.Value, scope: Scope) -> Fraction:
    value = evaluate(node, scope)
    if isinstance(value, Fraction):
        return value
    if isinstance(value, Word):
        near = nearest(value.text, scope.names())
        help = (f"did you mean `{near}`?",) if near else ("constants are declared by `let name = value`",)
        message = f"`{value.text}` is not a number here"
        raise Problem(Diagnostic(E041, message, node.span, "no such constant", help=help))
    raise Problem(Diagnostic(E041, f"arithmetic needs numbers, not `{show(value)}`", node.span))


def _binary(node: tree.Binary, scope: Scope) -> Fraction:
    left, right = _number(node.left, scope), _number(node.right, scope)
    if node.op in ("/", "//") and right == 0:
        raise Problem(Diagnostic(E041, "division by zero", node.right.span, "this is 0"))
    match node.op:
        case "+":
            value = left + right
        case "-":
            value = left - right
        case "*":
            value = left * right
        case "/":
            value = left / right
        case _:
            value = Fraction(left // right)
    return _bounded(value, node)


def _bounded(value: Fraction, node: tree.Node) -> Fraction:
    if abs(value) > MAX_NUMBER:
        raise Problem(Diagnostic(E041, "the result is too large a number (limit 1e30)", node.span))
    if abs(value.numerator) > MAX_NUMBER or value.denominator > MAX_NUMBER:
        raise Problem(Diagnostic(E041, "the exact result needs more than 30 digits", node.span))
    return value


def _numbers(node: tree.Term, scope: Scope, count: int | None) -> list[Fraction]:
    for arg in node.args:
        if arg.name is not None:
            raise Problem(
                Diagnostic(E043, f"`{node.name.text}` takes plain values", arg.name.span, "no name here")
            )
    if (count is not None and len(node.args) != count) or not node.args:
        wants = f"{count} values" if count else "at least one value"
        raise Problem(Diagnostic(E041, f"`{node.name.text}` takes {wants}, not {len(node.args)}", node.span))
    return [_number(arg.value, scope) for arg in node.args]


def _round_up(node: tree.Term, scope: Scope) -> Fraction:
    value, multiple = _numbers(node, scope, 2)
    if multiple <= 0:
        raise Problem(Diagnostic(E041, "the multiple must be greater than 0", node.args[1].span))
    return _bounded(-(-value // multiple) * multiple, node)


FUNCTIONS = {
    "round_up": _round_up,
    "min": lambda node, scope: min(_numbers(node, scope, None)),
    "max": lambda node, scope: max(_numbers(node, scope, None)),
}
