"""The tree of one model file: frozen nodes, each with its span. Equality ignores places, so
`read(write(file)) == file` is a plain comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

from mambadsl.text.source import Source, Span

# No slots and one repr for all: a command spends more time making these classes than using them.


@dataclass(frozen=True, kw_only=True, repr=False)
class Node:
    """A place in the text, and what stands there."""

    span: Span = field(compare=False)

    def __repr__(self) -> str:
        inner = (f"{k}={v!r}" for k, v in vars(self).items() if not isinstance(v, Span))
        return f"{type(self).__name__}({', '.join(inner)})"


@dataclass(frozen=True, repr=False)
class Name(Node):
    """A name where it is declared or referred to: `M`, `d_model`, `te.linear`."""

    text: str


# Values.


@dataclass(frozen=True, repr=False)
class Number(Node):
    """`text` as written (`131_072`, `1e-5`); `value` exact."""

    text: str = field(compare=False)
    value: Fraction


@dataclass(frozen=True, repr=False)
class String(Node):
    value: str


@dataclass(frozen=True, repr=False)
class Bool(Node):
    value: bool


@dataclass(frozen=True, repr=False)
class Arg(Node):
    """`name=value`, or a bare value (name is None)."""

    name: Name | None
    value: Value


@dataclass(frozen=True, repr=False)
class Term(Node):
    """A lower-case word, with or without arguments: `d_model`, `relu2`, `rope(theta=1e6)`. In a
    pattern: a kind written out in place. args is None where no parentheses stand."""

    name: Name
    args: tuple[Arg, ...] | None = None


@dataclass(frozen=True, repr=False)
class Use(Node):
    """A layer's name, upper case, with or without overrides: `M`, `A(window=4096)`."""

    name: Name
    args: tuple[Arg, ...] | None = None


@dataclass(frozen=True, repr=False)
class List(Node):
    items: tuple[Value, ...]


@dataclass(frozen=True, repr=False)
class Binary(Node):
    """op is one of + - * / //."""

    op: str
    left: Value
    right: Value


@dataclass(frozen=True, repr=False)
class Negative(Node):
    value: Value


@dataclass(frozen=True, repr=False)
class Paren(Node):
    value: Value


Value: TypeAlias = "Number | String | Bool | Term | Use | List | Binary | Negative | Paren"

# Patterns.


@dataclass(frozen=True, repr=False)
class Cut(Node):
    """`|`: a pipeline stage ends here."""


@dataclass(frozen=True, repr=False)
class Group(Node):
    """`[ ... ]`."""

    pattern: Pattern


@dataclass(frozen=True, repr=False)
class Repeat(Node):
    """`item * count`."""

    item: Unit
    count: int
    count_span: Span = field(compare=False)


@dataclass(frozen=True, repr=False)
class Parallel(Node):
    """`M + A`: one norm in, branch outputs summed."""

    branches: tuple[Unit, ...]


@dataclass(frozen=True, repr=False)
class Pattern(Node):
    items: tuple[Item, ...]


Unit: TypeAlias = "Use | Term | Group"
Item: TypeAlias = "Use | Term | Group | Repeat | Parallel | Cut"

# Statements.


@dataclass(frozen=True, repr=False)
class Import(Node):
    path: String
    names: tuple[Name, ...]


@dataclass(frozen=True, repr=False)
class Let(Node):
    name: Name
    value: Value


@dataclass(frozen=True, repr=False)
class Setting(Node):
    name: Name
    value: Value


@dataclass(frozen=True, repr=False)
class Model(Node):
    name: Name
    settings: tuple[Setting, ...]


@dataclass(frozen=True, repr=False)
class Layer(Node):
    """`layer X = ITEM` or, with shared=True, `shared X = ITEM`."""

    name: Name
    item: Item
    shared: bool = False


@dataclass(frozen=True, repr=False)
class Stack(Node):
    pattern: Pattern


@dataclass(frozen=True, repr=False)
class Mtp(Node):
    args: tuple[Arg, ...]
    pattern: Pattern


@dataclass(frozen=True, repr=False)
class Slot(Node):
    """One line of a parts block: `mamba2.scan = mine.ssd(block=64)`."""

    path: Name
    part: Name
    args: tuple[Arg, ...] | None = None


@dataclass(frozen=True, repr=False)
class Parts(Node):
    name: Name
    base: Name | None
    slots: tuple[Slot, ...]


@dataclass(frozen=True, repr=False)
class Expect(Node):
    """op is one of == != <= >= < >."""

    left: Value
    op: str
    right: Value


Statement: TypeAlias = "Import | Let | Model | Layer | Stack | Mtp | Parts | Expect"


@dataclass(frozen=True, repr=False)
class Comment(Node):
    """`text` starts with `#`. own_line: nothing but blanks stands before it on its line."""

    text: str
    own_line: bool


@dataclass(frozen=True, repr=False)
class File:
    """A whole file: statements, or one bare pattern (then `statements` is empty)."""

    source: Source = field(compare=False)
    statements: tuple[Statement, ...] = ()
    pattern: Pattern | None = None
    comments: tuple[Comment, ...] = field(default=(), compare=False)
