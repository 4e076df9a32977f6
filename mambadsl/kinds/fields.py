"""Field types: what a value may be, how it is read from the language's values and written back.

A type converts a raw value (what an expression of the language evaluates to) into the Python value
that kinds see, or raises `Mismatch` with the rule and help; the resolver adds the place. Raw values:
Fraction (every number), bool, str, `Word` (a bare lower-case word), `Call`, and lists of these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from mambadsl.kinds.values import Values, Variant


@dataclass(frozen=True)
class Word:
    """A bare lower-case word: `relu2`, `none`."""

    text: str


@dataclass(frozen=True)
class Call:
    """`name(key=value, ...)`. `keys` are places of the keys, `places` of the values: whatever object
    the caller uses for a place (a tree node), handed back in `Mismatch.at`."""

    name: str
    args: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict, compare=False)
    places: dict[str, Any] = field(default_factory=dict, compare=False)


#: Whole numbers up to _EXACT are the same as floats; there are no floats beyond MAX_REAL.
_EXACT, MAX_REAL = 2**53, Fraction(sys.float_info.max)


class Mismatch(Exception):
    """A value does not fit: `rule` completes "`heads` ...". at: the place inside the value, if any."""

    def __init__(self, rule: str, *, help: tuple[str, ...] = (), at: Any = None, name_problem: bool = False):
        super().__init__(rule)
        self.rule, self.help, self.at, self.name_problem = rule, help, at, name_problem


def show(raw: Any) -> str:
    """A raw value as a person would write it, for messages."""
    match raw:
        case bool():
            return "true" if raw else "false"
        case Fraction():
            return number_text(raw)
        case str():
            return f'"{raw}"'
        case Word():
            return raw.text
        case Call():
            return f"{raw.name}(...)"
        case list() | tuple():
            return "[" + ", ".join(show(item) for item in raw[:6]) + (", ...]" if len(raw) > 6 else "]")
        case None:
            return "none"
    return str(raw)


def number_text(value: Fraction | int | float) -> str:
    """Canonical text of a number: whole numbers plain, others as the shortest exact-to-float decimal.
    Reading it back gives the same float."""
    if isinstance(value, Fraction):
        if value.denominator == 1 and abs(value) <= _EXACT:
            return str(value.numerator)
        if abs(value) > MAX_REAL:
            return "a number beyond 1e308"
        value = float(value)
    if isinstance(value, int):
        return str(value)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


class Type:
    """says: one phrase, "a whole number of at least 1"."""

    says: str = "a value"

    def convert(self, raw: Any) -> Any:
        raise NotImplementedError

    def text(self, value: Any, *, full: bool = True) -> str:
        """The value in the language: convert(evaluate(text(v))) == v. full=False leaves out what a form's
        defaults say anyway."""
        raise NotImplementedError


class Int(Type):
    def __init__(self, low: int = 1, high: int = 2**40):
        self.low, self.high = low, high
        self.says = f"a whole number of at least {low}"

    def convert(self, raw: Any) -> int:
        if not isinstance(raw, Fraction):
            raise Mismatch(f"must be {self.says}, not `{show(raw)}`")
        if raw.denominator != 1:
            near = sorted({max(self.low, raw.__floor__()), max(self.low, raw.__ceil__())})
            small = max(abs(raw), raw.denominator) < 10**6
            exact = f"{raw.numerator}/{raw.denominator}" if small else show(raw)
            nearest = "the nearest whole number" + ("s are " if len(near) > 1 else " is ")
            help = (nearest + " and ".join(map(str, near)),) if near[-1] <= _EXACT else ()
            raise Mismatch(f"must be a whole number; {exact} is not", help=help)
        value = int(raw)
        if value < self.low:
            help = (f"the least is {self.low}",)
            raise Mismatch(f"must be at least {self.low}, not {show(raw)}", help=help)
        if value > self.high:
            raise Mismatch(f"must be at most {self.high:,}, not {show(raw)}")
        return value

    def text(self, value: int, *, full: bool = True) -> str:
        return str(value)


class Real(Type):
    """A finite decimal number, kept as int where whole, else float."""

    def __init__(self, low: float | None = None, high: float | None = None, *, above: float | None = None):
        self.low, self.high, self.above = low, high, above
        limits = [
            *([f"at least {number_text(low)}"] if low is not None and above is None else []),
            *([f"greater than {number_text(above)}"] if above is not None else []),
            *([f"at most {number_text(high)}"] if high is not None else []),
        ]
        self.says = " ".join(["a number", " and ".join(limits)]).strip()

    def convert(self, raw: Any) -> int | float:
        if not isinstance(raw, Fraction):
            raise Mismatch(f"must be {self.says}, not `{show(raw)}`")
        if abs(raw) > MAX_REAL:
            raise Mismatch("must be at most 1.8e308, the largest that computers reckon with")
        value = int(raw) if raw.denominator == 1 and abs(raw) <= _EXACT else float(raw)
        if (
            (self.low is not None and value < self.low)
            or (self.above is not None and value <= self.above)
            or (self.high is not None and value > self.high)
        ):
            raise Mismatch(f"must be {self.says}, not {show(raw)}")
        return value

    def text(self, value: int | float, *, full: bool = True) -> str:
        return number_text(value)


class Flag(Type):
    says = "`true` or `false`"

    def convert(self, raw: Any) -> bool:
        if not isinstance(raw, bool):
            raise Mismatch(f"must be `true` or `false`, not `{show(raw)}`")
        return raw

    def text(self, value: bool, *, full: bool = True) -> str:
        return "true" if value else "false"


class OneOf(Type):
    """A word of a fixed list."""

    def __init__(self, *words: str):
        self.words = words
        self.says = "one of " + ", ".join(f"`{w}`" for w in words)

    def convert(self, raw: Any) -> str:
        if isinstance(raw, Word) and raw.text in self.words:
            return raw.text
        raise Mismatch(f"must be {self.says}, not `{show(raw)}`", help=_spelled(raw, self.words))

    def text(self, value: str, *, full: bool = True) -> str:
        return value


class OrWord(Type):
    """Another type, or one word that stands for None: `window=none`, `scale=auto`."""

    def __init__(self, word: str, type: Type):
        self.word, self.type = word, type
        self.says = f"{type.says}, or `{word}`"

    def convert(self, raw: Any) -> Any:
        if raw is None or raw == Word(self.word):
            return None
        if isinstance(raw, Word):
            raise Mismatch(f"must be {self.says}, not `{raw.text}`", help=_spelled(raw, (self.word,)))
        return self.type.convert(raw)

    def text(self, value: Any, *, full: bool = True) -> str:
        return self.word if value is None else self.type.text(value, full=full)


class Items(Type):
    """A list of `length` values of one type (any length where None)."""

    def __init__(self, type: Type, length: int | None = None):
        self.type, self.length = type, length
        self.says = f"a list of {length} values" if length else "a list"

    def convert(self, raw: Any) -> tuple:
        if not isinstance(raw, (list, tuple)):
            raise Mismatch(f"must be {self.says}, not `{show(raw)}`")
        if self.length is not None and len(raw) != self.length:
            raise Mismatch(f"must have {self.length} values, not {len(raw)}")
        return tuple(self.type.convert(item) for item in raw)

    def text(self, value: tuple, *, full: bool = True) -> str:
        return "[" + ", ".join(self.type.text(item, full=full) for item in value) + "]"


class OneForm(Type):
    """One of several named forms, each with its own fields:

    OneForm(none=(), rope=(Field("theta", Real(), 10000, "..."),))
    """

    def __init__(self, **forms: tuple[Field, ...]):
        self.forms = forms
        self.says = "one of " + ", ".join(f"`{n}`" + ("(...)" if fs else "") for n, fs in forms.items())

    def convert(self, raw: Any) -> Variant:
        name = raw.text if isinstance(raw, Word) else raw.name if isinstance(raw, Call) else None
        if name not in self.forms:
            raise Mismatch(f"must be {self.says}, not `{show(raw)}`", help=_spelled(raw, tuple(self.forms)))
        given = raw if isinstance(raw, Call) else Call(name, {})
        return Variant(name, fill(self.forms[name], given, owner=f"`{name}`"))

    def convert_word(self, name: str) -> Variant:
        """The form `name` with its defaults."""
        return self.convert(Word(name))

    def text(self, value: Variant, *, full: bool = True) -> str:
        shown = [f for f in self.forms[value.name] if full or value.values[f.name] != f.default]
        inner = ", ".join(f"{f.name}={f.type.text(value.values[f.name], full=full)}" for f in shown)
        return f"{value.name}({inner})" if inner else value.name


REQUIRED = object()


class Computed:
    """A default that follows from other values: `of(values filled in so far, the model's settings)`.
    says: the same in the language, for the reader."""

    def __init__(self, says: str, of: Callable[[Values, Values], Any]):
        self.says, self.of = says, of

    def __call__(self, values: Values, model: Values) -> Any:
        return self.of(values, model)


@dataclass(frozen=True)
class Field:
    """One field of a kind, a form or the model.

    default: a value, REQUIRED, or Computed. unit: what it counts, for the reader. inert: what a trained model computes
    does not depend on it.
    """

    name: str
    type: Type
    default: Any
    doc: str
    unit: str = ""
    inert: bool = False


#: Of kinds whose initial dt is drawn by the law `dt_bias`.
DT_FIELDS = (
    Field("dt_min", Real(above=0), 0.001, "initial dt is drawn from [dt_min, dt_max]", inert=True),
    Field("dt_max", Real(above=0), 0.1, "initial dt is drawn from [dt_min, dt_max]", inert=True),
    Field("dt_floor", Real(above=0), 1e-4, "initial dt is at least this", inert=True),
)


def chunk_field(default: int) -> Field:
    """Of kinds with a scan by chunks."""
    says = "tokens computed together in the scan; no effect on the result"
    return Field("chunk", Int(1, 4096), default, says, "tokens", inert=True)


def fill(fields: tuple[Field, ...], given: Call, *, owner: str) -> Values:
    """Values of a form from its call: unknown names and missing ones are Mismatches."""
    names = [f.name for f in fields]
    for key in given.args:
        if key not in names:
            from mambadsl.text.spell import nearest

            near = nearest(key, names)
            help = (f"did you mean `{near}`?",) if near else (_takes(owner, names),)
            message, place = f"{owner} has no field `{key}`", given.keys.get(key)
            raise Mismatch(message, help=help, at=place, name_problem=True)
    done: dict[str, Any] = {}
    for f in fields:
        if f.name in given.args:
            try:
                done[f.name] = f.type.convert(given.args[f.name])
            except Mismatch as m:
                at = m.at if m.at is not None else given.places.get(f.name)
                rule = m.rule if m.name_problem else f"`{f.name}` {m.rule}"
                raise Mismatch(rule, help=m.help, at=at, name_problem=True) from None
        elif f.default is REQUIRED:
            raise Mismatch(f"{owner} needs `{f.name}`: {f.doc}", name_problem=True)
        else:
            done[f.name] = f.default
    return Values(done)


def _takes(owner: str, names: list[str]) -> str:
    return f"{owner} takes " + (", ".join(f"`{n}`" for n in names) if names else "no arguments")


def _spelled(raw: Any, words: tuple[str, ...]) -> tuple[str, ...]:
    from mambadsl.text.spell import nearest

    text = raw.text if isinstance(raw, Word) else raw.name if isinstance(raw, Call) else None
    near = nearest(text, words) if text else None
    return (f"did you mean `{near}`?",) if near else ()
