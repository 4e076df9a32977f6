"""Raw values (see kinds.fields) as text of the language: reading it back gives the same, exactly."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mambadsl.kinds.fields import Call, Word
from mambadsl.syntax import build, tree
from mambadsl.syntax.flat import flat
from mambadsl.syntax.tokens import MAX_DIGITS, MAX_EXPONENT


def text_of(raw: Any) -> str:
    """`[1, 2]`, `relu2`, `rope(theta=10000)`, `1 / 3`."""
    return flat(node(raw))


def node(raw: Any) -> tree.Value:
    """A raw value as an expression."""
    match raw:
        case Fraction():
            return number(raw)
        case str():
            return build.string(raw)
        case Word():
            return build.word(raw.text)
        case Call():
            return build.word(raw.name, {key: node(value) for key, value in raw.args.items()})
        case list() | tuple():
            return build.value([node(value) for value in raw])
    return build.value(raw)


def number(value: Fraction) -> tree.Value:
    """A number as an expression, for every number that the language can compute: one literal if it is one,
    else a quotient or a sum (whose parts are small, as all results are)."""
    try:
        return build.number(value)
    except ValueError:
        pass  # not in the usual notation
    if value < 0:
        return tree.Negative(tree.Paren(number(-value), span=build.NOWHERE), span=build.NOWHERE)
    if text := _scientific(value):
        return tree.Number(text, value, span=build.NOWHERE)
    if value.denominator != 1:
        return _binary("/", number(Fraction(value.numerator)), number(Fraction(value.denominator)))
    high, low = divmod(value.numerator, 10**15)
    return _binary("+", _binary("*", number(Fraction(high)), build.number(10**15)), build.number(low))


def _scientific(value: Fraction) -> str | None:
    """`12e-40`; None for what needs more digits than a literal may have."""
    exponent, rest = 0, value.denominator
    while rest % 10 == 0 or rest % 2 == 0 or rest % 5 == 0:
        rest //= 10 if rest % 10 == 0 else 2 if rest % 2 == 0 else 5
        exponent -= 1
    if rest != 1:
        return None
    whole = int(value * 10**-exponent)
    while whole % 10 == 0:
        whole, exponent = whole // 10, exponent + 1
    digits = str(whole)
    if exponent < -MAX_EXPONENT:
        point = len(digits) + exponent + MAX_EXPONENT
        digits = digits.rjust(len(digits) - point + 1, "0")
        digits, exponent = f"{digits[:max(point, 1)]}.{digits[max(point, 1):]}", -MAX_EXPONENT
    elif exponent > MAX_EXPONENT:
        digits, exponent = digits + "0" * (exponent - MAX_EXPONENT), MAX_EXPONENT
    return f"{digits}e{exponent}" if len(digits.replace(".", "")) <= MAX_DIGITS else None


def _binary(op: str, left: tree.Value, right: tree.Value) -> tree.Value:
    def closed(side: tree.Value) -> tree.Value:
        return tree.Paren(side, span=build.NOWHERE) if isinstance(side, tree.Binary) else side

    return tree.Binary(op, closed(left), closed(right), span=build.NOWHERE)
