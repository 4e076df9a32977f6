"""The tree of one model file: frozen nodes, each with its span. Equality ignores places, so
`read(write(file)) == file` is a plain comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

from mambadsl.text.source import Source, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Name(Node):
    """A name where it is declared or referred to: `M`, `d_model`, `te.linear`."""

    text: str


# ---- values


@dataclass(frozen=True, slots=True)
class Number(Node):
    """`text` as written (`131_072`, `1e-5`); `value` exact."""

    text: str = field(compare=False)
    value: Fraction


@dataclass(frozen=True, slots=True)
class String(Node):
    value: str


@dataclass(frozen=True, slots=True)
class Bool(Node):
    value: bool


@dataclass(frozen=True, slots=True)
class Arg(Node):
    """`name=value`, or a bare value (name is None)."""

    name: Name | None
    value: Value


@dataclass(frozen=True, slots=True)
class Term(Node):
    """A lower-case word, with or without arguments: `d_model`, `relu2`, `rope(theta=1e6)`. In a
    pattern: a kind written out in place. args is None where no parentheses stand."""

    name: Name
    args: tuple[Arg, ...] | None = None


@dataclass(frozen=True, slots=True)
class Use(Node):
    """A layer's name, upper case, with or without overrides: `M`, `A(window=4096)`."""

    name: Name
    args: tuple[Arg, ...] | None = None


@dataclass(frozen=True, slots=True)
class List(Node):
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """op is one of + - * / //."""

    op: str
    left: Value
    right: Value


@dataclass(frozen=True, slots=True)
class Negative(Node):
    value: Value


@dataclass(frozen=True, slots=True)
class Paren(Node):
    value: Value


Value: TypeAlias = "Number | String | Bool | Term | Use | List | Binary | Negative | Paren"

# ---- patterns


@dataclass(frozen=True, slots=True)
class Cut(Node):
    """`|`: a pipeline stage ends here."""


@dataclass(frozen=True, slots=True)
class Group(Node):
    """`[ ... ]`."""

    pattern: Pattern


@dataclass(frozen=True, slots=True)
class Repeat(Node):
    """`item * count`."""

    item: Unit
    count: int
    count_span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Parallel(Node):
    """`M + A`: one norm in, branch outputs summed."""

    branches: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Pattern(Node):
    items: tuple[Item, ...]


Unit: TypeAlias = "Use | Term | Group"
Item: TypeAlias = "Use | Term | Group | Repeat | Parallel | Cut"

# ---- statements


@dataclass(frozen=True, slots=True)
class Import(Node):
    path: String
    names: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class Let(Node):
    name: Name
    value: Value


@dataclass(frozen=True, slots=True)
class Setting(Node):
    name: Name
    value: Value


@dataclass(frozen=True, slots=True)
class Model(Node):
    name: Name
    settings: tuple[Setting, ...]


@dataclass(frozen=True, slots=True)
class Layer(Node):
    """`layer X = ITEM` or, with shared=True, `shared X = ITEM`."""

    name: Name
    item: Item
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Stack(Node):
    pattern: Pattern


@dataclass(frozen=True, slots=True)
class Mtp(Node):
    args: tuple[Arg, ...]
    pattern: Pattern


@dataclass(frozen=True, slots=True)
class Slot(Node):
    """One line of a parts block: `mamba2.scan = mine.ssd(block=64)`."""

    path: Name
    part: Name
    args: tuple[Arg, ...] | None = None


@dataclass(frozen=True, slots=True)
class Parts(Node):
    name: Name
    base: Name | None
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Expect(Node):
    """op is one of == != <= >= < >."""

    left: Value
    op: str
    right: Value


Statement: TypeAlias = "Import | Let | Model | Layer | Stack | Mtp | Parts | Expect"


@dataclass(frozen=True, slots=True)
class Comment(Node):
    """`text` starts with `#`. own_line: nothing but blanks stands before it on its line."""

    text: str
    own_line: bool


@dataclass(frozen=True, slots=True)
class File:
    """A whole file: statements, or one bare pattern (then `statements` is empty)."""

    source: Source = field(compare=False, repr=False)
    statements: tuple[Statement, ...] = ()
    pattern: Pattern | None = None
    comments: tuple[Comment, ...] = field(default=(), compare=False)
