"""One function per grammar rule: the children it keeps -> its node of the tree."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable, Collection

from mambadsl.syntax import tree
from mambadsl.syntax.tokens import Token
from mambadsl.text.diagnostic import Diagnostic, declare
from mambadsl.text.source import Source, Span

E017 = declare(
    "E017",
    "a keyword used as a name",
    """
    The words that begin statements, `import`, `true` and `false` cannot name a constant, a model or a part
    set: a line such as `let layer = 3` reads like something else. As names of settings and arguments they
    are fine (`f(model=4)`).
    """,
)


def reducer(source: Source, *, keywords: Collection[str], problems: list[Diagnostic]) -> Callable[..., Any]:
    """What `Parser` calls for each finished rule. Keywords taken as names go to `problems`."""

    def reduce(origin: str, children: list, start: int, end: int) -> Any:
        if origin in _DECLARES and (token := children[0]).text in keywords:
            span = Span(source, token.start, token.end)
            problems.append(Diagnostic(E017, f"`{token.text}` is a keyword, not a name", span))
        return _MAKERS[origin](children, Span(source, start, end))

    return reduce


_DECLARES = frozenset({"let", "model", "parts", "symbol"})


def _name(token: Token, span: Span) -> tree.Name:
    return tree.Name(span=Span(span.source, token.start, token.end), text=token.text)


def _start(c: list, span: Span) -> tree.Pattern | tuple:
    return c[0] if isinstance(c[0], tree.Pattern) else tuple(c)


def _dotted(c: list, span: Span) -> tree.Name:
    return tree.Name(span=span, text=".".join(token.text for token in c))


def _string(c: list, span: Span) -> tree.String:
    return tree.String(span=span, value=c[0].text[1:-1])


def _number(c: list, span: Span) -> tree.Number:
    text = c[0].text
    return tree.Number(span=span, text=text, value=Fraction(text.replace("_", "")))


def _args(c: list, span: Span) -> tuple[tree.Arg, ...]:
    return tuple(v if isinstance(v, tree.Arg) else tree.Arg(span=v.span, name=None, value=v) for v in c)


def _optional(c: list, at: int) -> Any:
    return c[at] if len(c) > at else None


def _layer(shared: bool) -> Callable[[list, Span], tree.Layer]:
    return lambda c, span: tree.Layer(span=span, name=_name(c[0], span), item=c[1], shared=shared)


def _binary(c: list, span: Span) -> tree.Binary:
    return tree.Binary(span=span, op=c[1].text, left=c[0], right=c[2])


def _term(c: list, span: Span) -> tree.Term:
    return tree.Term(span=span, name=c[0], args=_optional(c, 1))


def _repeat(c: list, span: Span) -> tree.Repeat:
    count = c[1]
    return tree.Repeat(
        span=span,
        item=c[0],
        count=int(count.text),
        count_span=Span(span.source, count.start, count.end),
    )


def _mtp(c: list, span: Span) -> tree.Mtp:
    return tree.Mtp(span=span, args=c[0] if len(c) == 2 else (), pattern=c[-1])


def _parts(c: list, span: Span) -> tree.Parts:
    base = c[1] if len(c) > 1 and isinstance(c[1], tree.Name) else None
    slots = tuple(c[1:] if base is None else c[2:])
    return tree.Parts(span=span, name=_name(c[0], span), base=base, slots=slots)


_MAKERS: dict[str, Callable[[list, Span], Any]] = {
    "start": _start,
    "import_": lambda c, span: tree.Import(
        span=span, path=_string(c[:1], Span(span.source, c[0].start, c[0].end)), names=tuple(c[1:])
    ),
    "let": lambda c, span: tree.Let(span=span, name=_name(c[0], span), value=c[1]),
    "model": lambda c, span: tree.Model(span=span, name=_name(c[0], span), settings=tuple(c[1:])),
    "layer": _layer(shared=False),
    "shared": _layer(shared=True),
    "stack": lambda c, span: tree.Stack(span=span, pattern=c[0]),
    "mtp": _mtp,
    "parts": _parts,
    "expect": lambda c, span: tree.Expect(span=span, left=c[0], op=c[1].text, right=c[2]),
    "setting": lambda c, span: tree.Setting(span=span, name=_name(c[0], span), value=c[1]),
    "slot": lambda c, span: tree.Slot(span=span, path=c[0], part=c[1], args=_optional(c, 2)),
    "symbol": lambda c, span: _name(c[0], span),
    "pattern": lambda c, span: tree.Pattern(span=span, items=tuple(c)),
    "cut": lambda c, span: tree.Cut(span=span),
    "repeat": _repeat,
    "parallel": lambda c, span: tree.Parallel(span=span, branches=tuple(c)),
    "use": lambda c, span: tree.Use(span=span, name=_name(c[0], span), args=_optional(c, 1)),
    "kind": _term,
    "group": lambda c, span: tree.Group(span=span, pattern=c[0]),
    "args": _args,
    "named": lambda c, span: tree.Arg(span=span, name=_name(c[0], span), value=c[1]),
    "list": lambda c, span: tree.List(span=span, items=tuple(c)),
    "add": _binary,
    "mul": _binary,
    "negative": lambda c, span: tree.Negative(span=span, value=c[1]),
    "paren": lambda c, span: tree.Paren(span=span, value=c[0]),
    "number": _number,
    "string": _string,
    "true": lambda c, span: tree.Bool(span=span, value=True),
    "false": lambda c, span: tree.Bool(span=span, value=False),
    "term": _term,
    "dotted": _dotted,
    "path": _dotted,
}
