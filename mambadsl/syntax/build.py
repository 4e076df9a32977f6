"""Tree nodes for files that no one has written yet: `expand`, printing a graph, converters.

Their span is NOWHERE; `write` lays them out by width alone. Only what is awkward to spell with the nodes
of `tree` themselves has a function here.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Iterable, Mapping, Sequence

from mambadsl.syntax import tree
from mambadsl.syntax.tokens import MAX_DIGITS, MAX_INTEGER, out_of_range
from mambadsl.text.source import Source, Span

NOWHERE = Span(Source("<built>", ""), 0, 0)


def name(text: str) -> tree.Name:
    return tree.Name(span=NOWHERE, text=text)


def number(value: int | float | Fraction) -> tree.Value:
    """The exact number as the language writes it: `4096`, `1e-5`, `-1`, `2 / 3`. A float counts as its
    shortest decimal text, as a person would have typed it. Raises ValueError where the language has no
    such number (not finite, a whole number over 2**53, more than 20 digits)."""
    if value < 0:
        of = number(-value)
        of = tree.Paren(span=NOWHERE, value=of) if isinstance(of, tree.Binary) else of
        return tree.Negative(span=NOWHERE, value=of)
    exact = Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
    shortest = repr(value).replace("e-0", "e-").replace("e+", "e") if isinstance(value, float) else None
    text = shortest if exact.denominator != 1 and shortest else _digits(exact) or shortest
    if text is None and exact.denominator != 1:
        top, bottom = number(exact.numerator), number(exact.denominator)
        return tree.Binary(span=NOWHERE, op="/", left=top, right=bottom)
    type = "INT" if text is not None and text.isdigit() else "FLOAT"
    if text is None or (why := out_of_range(type, text)):
        raise ValueError(f"the language cannot write the number {value}" + (f": {why}" if text else ""))
    return tree.Number(span=NOWHERE, text=text, value=exact)


def _digits(value: Fraction) -> str | None:
    """The text of a whole number up to 2**53 or of a decimal of at most 20 digits, else None."""
    if value.denominator == 1:
        return str(value.numerator) if value <= MAX_INTEGER else None
    places = next((n for n in range(MAX_DIGITS + 1) if 10**n % value.denominator == 0), None)
    if places is None or value * 10**places >= 10**MAX_DIGITS:
        return None
    digits = Decimal((value * 10**places).numerator)
    return str(digits.scaleb(-places)).replace("E", "e")


def value(of: object) -> tree.Value:
    """A Python value as a node: numbers, bools, lists; a str is a word (`relu2`), None the word `none`.
    Nodes stay as they are; strings in quotes are `string`."""
    if isinstance(of, tree.Node):
        return of
    if isinstance(of, bool):
        return tree.Bool(span=NOWHERE, value=of)
    if isinstance(of, (int, float, Fraction)):
        return number(of)
    if isinstance(of, str) or of is None:
        return word(of if of is not None else "none")
    if isinstance(of, (list, tuple)):
        return tree.List(span=NOWHERE, items=tuple(value(item) for item in of))
    raise TypeError(f"no value of the language: {of!r}")


def string(text: str) -> tree.String:
    if '"' in text or "\n" in text:
        raise ValueError(f"a string of the language holds no quote and no line break: {text!r}")
    return tree.String(span=NOWHERE, value=text)


def args(named: Mapping[str, object]) -> tuple[tree.Arg, ...]:
    return tuple(tree.Arg(span=NOWHERE, name=name(key), value=value(of)) for key, of in named.items())


def word(text: str, named: Mapping[str, object] | None = None) -> tree.Term:
    """`relu2`, or with named arguments `mamba2(heads=128)`; an empty mapping gives `mamba2()`."""
    return tree.Term(span=NOWHERE, name=name(text), args=None if named is None else args(named))


def use(layer: str, named: Mapping[str, object] | None = None) -> tree.Use:
    """`A`, or with overrides `A(window=4096)`."""
    return tree.Use(span=NOWHERE, name=name(layer), args=args(named) if named else None)


def pattern(items: Sequence[tree.Item]) -> tree.Pattern:
    return tree.Pattern(span=NOWHERE, items=tuple(items))


def group(items: Sequence[tree.Item]) -> tree.Group:
    return tree.Group(span=NOWHERE, pattern=pattern(items))


def repeat(item: tree.Unit, count: int) -> tree.Repeat:
    return tree.Repeat(span=NOWHERE, item=item, count=count, count_span=NOWHERE)


def parallel(branches: Sequence[tree.Unit]) -> tree.Parallel:
    return tree.Parallel(span=NOWHERE, branches=tuple(branches))


def cut() -> tree.Cut:
    return tree.Cut(span=NOWHERE)


def let(constant: str, of: object) -> tree.Let:
    return tree.Let(span=NOWHERE, name=name(constant), value=value(of))


def model(called: str, settings: Mapping[str, object]) -> tree.Model:
    lines = (tree.Setting(span=NOWHERE, name=name(k), value=value(v)) for k, v in settings.items())
    return tree.Model(span=NOWHERE, name=name(called), settings=tuple(lines))


def layer(called: str, item: tree.Item, *, shared: bool = False) -> tree.Layer:
    return tree.Layer(span=NOWHERE, name=name(called), item=item, shared=shared)


def stack(items: Sequence[tree.Item]) -> tree.Stack:
    return tree.Stack(span=NOWHERE, pattern=pattern(items))


def mtp(items: Sequence[tree.Item], named: Mapping[str, object]) -> tree.Mtp:
    return tree.Mtp(span=NOWHERE, args=args(named), pattern=pattern(items))


def expect(left: object, op: str, right: object) -> tree.Expect:
    return tree.Expect(span=NOWHERE, left=value(left), op=op, right=value(right))


def file(statements: Iterable[tree.Statement], *, comments: Iterable[str] = ()) -> tree.File:
    """A file of statements; comments (without `#`) become its first lines."""
    lines = tuple(tree.Comment(span=NOWHERE, text=f"# {line}".rstrip(), own_line=True) for line in comments)
    return tree.File(source=NOWHERE.source, statements=tuple(statements), comments=lines)
