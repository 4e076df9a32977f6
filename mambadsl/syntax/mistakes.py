"""Failures of the parser -> diagnostics in people's words.

One failure gives at most one diagnostic; none where the tokenizer has already reported the cause.
`_HINTS` is a list of small questions asked in order; the first that knows the mistake answers.
"""

from __future__ import annotations

from dataclasses import replace

from mambadsl.syntax.expected import found_words
from mambadsl.syntax.parser import HEADS, Parser
from mambadsl.syntax.stuck import E010, NAME_STARTS, OPENERS, VALUE_STARTS, Stuck
from mambadsl.syntax.tables import END
from mambadsl.syntax.tokens import CLOSER, E015, MAX_DEPTH, Token, Tokens
from mambadsl.text.diagnostic import Diagnostic, Label, declare
from mambadsl.text.source import Source, Span

E012 = declare(
    "E012",
    "a bracket without its partner",
    """
    `( )` holds arguments, `[ ]` a group or a list, `{ }` the body of a statement. Each must be closed by
    its own partner, inside out. The second label shows the bracket that is open.
    """,
)
E018 = declare(
    "E018",
    "a name in the wrong case",
    """
    Case is grammar: the names of layers start with an upper-case letter (`M`, `Local`), all other names
    with a lower-case one (kinds, fields, constants, parts). So a pattern can be read without knowing any
    declaration, and a new keyword can never take a layer's name.
    """,
)
E019 = declare(
    "E019",
    "a pattern in Megatron's notation",
    """
    Megatron writes one character for each layer, without blanks: `M` Mamba-2, `*` attention, `-` MLP,
    `E` MoE, `G` gated delta net; `|` cuts stages and `/` begins the multi-token-prediction layers.
    Here layers are words with blanks between them, and `*` repeats: `M-M*-` is `M F M A F`.
    """,
)

_MEGATRON = {"M": "M", "*": "A", "-": "F", "E": "E", "G": "G", "|": "|"}


def explain(source: Source, tokens: Tokens, parser: Parser) -> list[Diagnostic]:
    out = []
    for failure in parser.failures:
        items = tokens.items
        since = items[failure.begin - 1].end if failure.begin else 0
        if not any(since <= at <= items[failure.index].end for at in tokens.bad):
            out.append(_explain(Stuck(source, items, parser, failure)))
    return out


def _explain(place: Stuck) -> Diagnostic:
    if place.failure.too_deep:
        help = ("name the inner part: `let x = ...`, `layer B = [M F]`",)
        message = f"brackets and operators nest more than {MAX_DEPTH} deep"
        return Diagnostic(E015, message, place.span(place.found), help=help)
    for hint in _HINTS:
        if (diagnostic := hint(place)) is not None:
            return diagnostic
    return place.wrong()


def _megatron(p: Stuck) -> Diagnostic | None:
    text, start, end = p.source.text, p.found.start, p.found.end
    if p.found.type == END:
        start = end = p.span(p.found).end
    allowed = {*_MEGATRON, "/"}
    while start and text[start - 1] in allowed:
        start -= 1
    while end < len(text) and text[end] in allowed:
        end += 1
    run = text[start:end]
    if not set(run) <= allowed or not set(run) & set("MEG") or len(run) < 2 or text[end : end + 1].isalnum():
        return None
    if p.found.type == END and not run.endswith(("*", "-")):
        return None
    body, *tails = [" ".join(_MEGATRON[mark] for mark in part) for part in run.split("/")]
    if not tails:
        spelling = f"write `{body}`"
    else:
        depths = f"depths={len(tails)}"
        spelling = f"write `stack {{ {body} }}` and `mtp({depths}) {{ {tails[0]} }}`"
    return Diagnostic(
        E019,
        f"`{run if len(run) <= 60 else run[:57] + '...'}` is a Megatron pattern",
        Span(p.source, start, end),
        notes=("in Megatron `M` is Mamba-2, `*` attention, `-` MLP, `E` MoE",),
        help=(spelling,),
    )


def _bracket(p: Stuck) -> Diagnostic | None:
    opener, found = p.opener(), p.found
    if found.type in OPENERS:
        if opener is None:
            message = f"`{found.text}` closes nothing"
            return Diagnostic(
                E012, message, p.span(found), help=("delete it, or add its opening partner before",)
            )
        if opener.type != OPENERS[found.type]:
            closer = p.parser.tables.literals[CLOSER[opener.type]]
            message = f"expected `{closer}` to close `{opener.text}`, found `{found.text}`"
            return Diagnostic(E012, message, p.span(found), labels=(_opened(p, opener),))
    if opener is not None and (found.type == END or p.starts_statement):
        closer = p.parser.tables.literals[CLOSER[opener.type]]
        message = f"`{opener.text}` is not closed: expected `{closer}` before {found_words(found)}"
        return Diagnostic(E012, message, p.span(found), labels=(_opened(p, opener),))
    return None


def _opened(p: Stuck, opener: Token) -> Label:
    return Label(p.span(opener), f"this `{opener.text}` is open")


def _misspelt_statement(p: Stuck) -> Diagnostic | None:
    from mambadsl.text.spell import nearest

    first, at = p.first, p.failure.index - p.failure.begin
    if "LET" in p.accepts:
        first, at = p.found, 0
    if first.type not in NAME_STARTS or first.text in HEADS or at > 2:
        return None
    near = nearest(first.text, HEADS) if len(first.text) > 2 else None
    if near is None or (first.type == "LAYER_NAME" and first.text.lower() != near):
        return None
    if (
        at == 0
        or p.found.type in {"LAYER_NAME", "NAME", "STRING", "LBRACE"}
        or (at == 2 and p.found.type == "EQUAL")
    ):
        message = f"no statement begins with `{first.text}`"
        return Diagnostic(E010, message, p.span(first), help=(f"did you mean `{near}`?",))
    return None


def _loose_setting(p: Stuck) -> Diagnostic | None:
    if p.first.type == "NAME" and p.found.type == "EQUAL" and p.failure.index == p.failure.begin + 1:
        name = p.first.text
        return p.wrong(
            f"a constant is `let {name} = ...`; a setting stands in `model NAME {{ {name} = ... }}`"
        )
    return None


def _pattern_beside_statements(p: Stuck) -> Diagnostic | None:
    if p.first.text in {"layer", "shared"} and p.found.type in {"LAYER_NAME", "LSQB"} and "LET" in p.accepts:
        return p.wrong("several layers in a row are a group: `[M F]`")
    bare_then_statement = p.starts_statement and not p.keyword(p.first)
    statement_then_bare = "LET" in p.accepts and p.found.type in {"LAYER_NAME", "LSQB", "VBAR"}
    if "$END" in p.accepts and (bare_then_statement or statement_then_bare):
        return p.wrong("beside statements a pattern stands in `stack { ... }`")
    return None


def _case(p: Stuck) -> Diagnostic | None:
    found, before = p.found, p.back()
    if found.type == "LAYER_NAME" and "NAME" in p.accepts and not p.accepts & {"LAYER_NAME", "COMMA", "LET"}:
        lower = found.text[0].lower() + found.text[1:]
        message = f"only layers start upper case; expected a lower-case name, found `{found.text}`"
        return Diagnostic(E018, message, p.span(found), help=(f"write `{lower}`",))
    if found.type == "NAME" and p.accepts == {"LAYER_NAME"} and not p.keyword(found):
        message = f"the name of a layer starts upper case, found `{found.text}`"
        return Diagnostic(E018, message, p.span(found), help=(f"write `{_upper(found.text)}`",))
    if before and before.type == "NAME" and p.accepts == {"DOT", "LPAR"}:
        help = [f"a layer starts upper case: `{_upper(before.text)}`"]
        if len(before.text) > 1:
            help.append(f"a kind in a pattern has arguments: `{before.text}(...)`")
        message = f"`{before.text}` is neither a layer nor a kind with arguments"
        return Diagnostic(E018, message, p.span(before), help=tuple(help))
    return None


def _upper(text: str) -> str:
    return text.lstrip("_")[:1].upper() + text.lstrip("_")[1:] or text


def _equals(p: Stuck) -> Diagnostic | None:
    after = p.tokens[p.failure.index + 1] if p.found.type != END else p.found
    if p.found.type == "EQUAL" and "COMPARE" in p.accepts:
        if after.text in {"<", ">"} and after.start == p.found.end:
            return p.wrong(f"write `{after.text}=`")
        return p.wrong("to compare, write `==`")
    if p.found.type == "EQUAL" and "LBRACE" in p.accepts:
        return p.wrong("no `=` stands before `{`")
    if p.found.text in {"==", ":"} and "EQUAL" in p.accepts:
        return p.wrong("to set a value, write `=`")
    return None


def _power(p: Stuck) -> Diagnostic | None:
    before = p.back()
    if (
        p.found.type == "STAR"
        and before is not None
        and before.type == "STAR"
        and before.end == p.found.start
    ):
        span = p.span(before).to(p.span(p.found))
        if "INT" in p.accepts and "NAME" not in p.accepts:
            return replace(p.wrong("a repeat has one star: `M*3`"), span=span, message="`**` does not repeat")
        return replace(
            p.wrong("write the number out, or a product"), span=span, message="there is no power `**`"
        )
    return None


def _slashes(p: Stuck) -> Diagnostic | None:
    after = p.tokens[p.failure.index + 1] if p.failure.index + 1 < len(p.tokens) else None
    comment = p.found.type == "FLOOR" or (
        p.found.type == "SLASH" and after is not None and after.type == "STAR"
    )
    return p.wrong("a comment begins with `#`") if comment else None


def _suffix(p: Stuck) -> Diagnostic | None:
    before, found = p.back(), p.found
    if before and before.type in {"INT", "FLOAT"} and found.type in NAME_STARTS and before.end == found.start:
        span = p.span(before).to(p.span(found))
        message = f"`{before.text}{found.text}`: a number has no suffix"
        return Diagnostic(E010, message, span, help=("write it out: `4_096`, `7e9`, `4 * 1024`",))
    return None


def _sum_to_repeat(p: Stuck) -> Diagnostic | None:
    twice = p.back().type == "INT" and p.back(2).type == "STAR" if p.back(2) else False
    if p.found.type != "STAR" or "STAR" in p.accepts or not (twice or "PLUS" in p.accepts):
        return None
    count = p.tokens[p.failure.index + 1]
    times = count.text if count.type == "INT" else "2"
    start = _unit_start(p, p.failure.index - (3 if twice else 1))
    while start is not None and start > p.failure.begin and p.tokens[start - 1].type == "PLUS":
        start = _unit_start(p, start - 2)
    if start is None:
        return p.wrong("what is to be repeated needs a group: `[M+A]*2`")
    text = p.source.text[p.tokens[start].start : p.tokens[p.failure.index - 1].end]
    text = text if len(text) <= 60 and "\n" not in text else "..."
    return p.wrong(f"what is to be repeated needs a group: `[{text}]*{times}`")


def _unit_start(p: Stuck, at: int) -> int | None:
    """Index where the layer, kind or group ends whose last token is at `at`."""
    depth = 0
    while at >= p.failure.begin:
        token = p.tokens[at]
        depth += (token.type in OPENERS) - (token.type in CLOSER)
        begins = token.type == "LSQB" or (token.type in NAME_STARTS and p.tokens[at - 1].type != "DOT")
        if depth == 0 and begins:
            return at
        at -= 1
    return None


def _round_group(p: Stuck) -> Diagnostic | None:
    opener = p.opener()
    if p.found.type == "LPAR" and "LSQB" in p.accepts and "LAYER_NAME" in p.accepts:
        return p.wrong("`( )` holds arguments; a group is written `[M A]`")
    before = p.back()
    in_round = opener is not None and opener.type == "LPAR" and before is not None
    ends_layer = in_round and before.type in {"LAYER_NAME", "RPAR"} and not p.accepts & {"PLUS", "EQUAL"}
    if ends_layer and p.found.type in {"PLUS", "STAR", "LAYER_NAME", "VBAR"}:
        hint = p.wrong("`( )` holds arguments; a group is written `[M A]`, a sum `[M+A]`")
        return replace(hint, labels=(Label(p.span(opener), "opens arguments"),))
    return None


def _missing_comma(p: Stuck) -> Diagnostic | None:
    if "COMMA" in p.accepts and p.found.type in VALUE_STARTS and p.ends_operand:
        return p.wrong(f"put a `,` before `{p.found.text}`")
    return None


def _needless_comma(p: Stuck) -> Diagnostic | None:
    if p.found.type != "COMMA":
        return None
    if "LAYER_NAME" in p.accepts:
        return p.wrong("layers stand side by side, with blanks: `M M A`")
    if p.first.text in {"model", "parts", "let"} and p.accepts & {"RBRACE", "LET"}:
        return p.wrong("delete it: commas separate arguments only")
    return None


def _empty(p: Stuck) -> Diagnostic | None:
    if p.found.type == END and p.failure.index == p.failure.begin and "LET" in p.accepts:
        return Diagnostic(
            E010,
            "the file says nothing",
            p.span(p.found),
            help=("the smallest model is a pattern: `M M M A`",),
        )
    return None


_HINTS = (
    _empty, _megatron, _power, _misspelt_statement, _pattern_beside_statements, _bracket, _loose_setting,
    _equals, _suffix, _slashes, _round_group, _case, _sum_to_repeat, _missing_comma,
    _needless_comma,
)  # fmt: skip
