"""Terminals -> words that people use: what was expected, what was found."""

from __future__ import annotations

from typing import Mapping

from mambadsl.syntax.tables import END
from mambadsl.syntax.tokens import Token

_OPERATORS = frozenset({"PLUS", "MINUS", "STAR", "SLASH", "FLOOR"})
_STATEMENTS = frozenset({"FROM", "LET", "MODEL", "LAYER", "SHARED", "STACK", "MTP", "PARTS", "EXPECT"})
_VALUE = frozenset({"NAME", "INT", "FLOAT", "STRING", "TRUE", "FALSE", "LPAR", "MINUS"})
#: Terminals that stand for one thing when all of them are accepted; the largest first.
_SETS: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (_STATEMENTS, ("a new statement",)),
    (_VALUE | {"LSQB", "LAYER_NAME"}, ("a value",)),
    (_VALUE, ("a value",)),
    (frozenset({"NAME", "LAYER_NAME", "LSQB"}), ("a layer", "a group")),
)
_WORDS = {
    "LAYER_NAME": "a layer's name",
    "NAME": "a lower-case name",
    "INT": "a whole number",
    "FLOAT": "a number",
    "STRING": 'a string such as `"std/base.mdl"`',
    "COMPARE": "a comparison such as `==`",
    END: "the end of the file",
}


def expected(accepts: frozenset[str], literals: Mapping[str, str]) -> str:
    """ "`)` or `,`": marks first, then kinds of words. Operators and what could lengthen the last word are
    left out where something ends it."""
    left, phrases = set(accepts), []
    for terminals, words in _SETS:
        if terminals <= left:
            left -= terminals
            phrases += words
    ends_value = (
        left & {"COMMA", "RPAR", "RSQB", "RBRACE", "COMPARE", "EQUAL", END} or "a new statement" in phrases
    )
    if ends_value or "a group" in phrases:
        left -= _OPERATORS | {"DOT", "LPAR", "VBAR"}
    elif _OPERATORS <= left:
        left -= _OPERATORS
        phrases.append("an operator")
    if END in left and "a new statement" in phrases:
        left.remove(END)
    marks = sorted((t for t in left if t not in _WORDS), key=lambda t: (t == "COMMA", t))
    words = [_WORDS[t] for t in sorted(left, key=lambda t: (t == END, t)) if t in _WORDS]
    return _join([f"`{literals[t]}`" for t in marks] + phrases + words)


def found_words(token: Token) -> str:
    if token.type == END:
        return "the end of the file"
    text = token.text if len(token.text) <= 40 else token.text[:37] + "..."
    return f"`{text}`"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " or " + parts[-1]
