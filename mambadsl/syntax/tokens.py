"""Source -> tokens and comments.

Out: `Tokens`, closed by an END token. Nothing raises here: characters that are no part of the language
are reported and left out (or repaired), so that the parser sees the rest. Bounds on depth, number of
tokens and size of numbers are held here, before anything recursive or exact touches the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from mambadsl.syntax import tables
from mambadsl.syntax.tree import Comment
from mambadsl.text.diagnostic import Diagnostic, Label, declare
from mambadsl.text.source import Source, Span

MAX_DEPTH = 64
MAX_TOKENS = 40_000
MAX_INTEGER = 2**53
MAX_DIGITS = 20
MAX_EXPONENT = 308
MAX_REPORTED = 50

E011 = declare(
    "E011",
    "a character that the language does not have",
    """
    Model files use letters, digits, `_`, blanks, `"` and `# = ( ) [ ] { } , . : | + - * / < > !=`. Anything
    else is refused where it stands. The usual causes are invisible or look-alike characters pasted from
    a web page or a PDF (no-break spaces, curly quotes, long dashes) and habits of other languages:
    `;` after a statement, `'text'`, `//` for a comment. Inside comments and strings every character is fine.
    """,
)
E013 = declare(
    "E013",
    "a string without an end",
    """
    A string begins and ends with `"` on one line. There are no escapes, so it cannot hold a `"`.
    """,
)
E014 = declare(
    "E014",
    "a number out of range",
    f"""
    Whole numbers go up to 2**53 = {MAX_INTEGER:_} (9 quadrillion; the largest model has some
    10**13 parameters) and have at most {MAX_DIGITS} digits; an exponent lies within
    -{MAX_EXPONENT} .. {MAX_EXPONENT}. Numbers are exact, so a slip of the keyboard such as `1e99999999` would
    otherwise fill the memory.
    """,
)
E015 = declare(
    "E015",
    "nested too deep",
    f"""
    Brackets, and the operators of one sum or product, nest at most {MAX_DEPTH} deep. No model needs
    more than five or six: name the inner block (`layer B = [M F]`) or the inner value (`let x = ...`).
    """,
)
E016 = declare(
    "E016",
    "the file is too long",
    f"""
    A file has at most {MAX_TOKENS:_} words and marks. Repeats keep it short: `[M F]*24` says what
    `M F M F ...` says in 48 words.
    """,
)

CLOSER = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
_OPENERS, _CLOSERS = frozenset(CLOSER), frozenset(CLOSER.values())
_QUOTES = {
    "'": "'",
    "`": "`",
    "\u2018": "\u2019",
    "\u201c": "\u201d",
    "\u201d": "\u201d",
    "\u201e": "\u201c",
    "\u00ab": "\u00bb",
}
_LOOK_ALIKE = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\u00d7": "*", "\u2217": "*",
    "\u22c5": "*", "\u00b7": "*", "\u00f7": "/", "\u2264": "<=", "\u2265": ">=", "\u2260": "!=",
    "\u2550": "=",
    "\uff0c": ",", "\u3001": ",", "\uff1d": "=", "\uff08": "(", "\uff09": ")", "\uff3b": "[", "\uff3d": "]",
    "\uff5b": "{", "\uff5d": "}", "\uff0b": "+", "\uff0a": "*", "\uff5c": "|", "\u2223": "|", "\u00a6": "|",
    "\uff1a": ":", "\uff03": "#",
}  # fmt: skip
_HELP = {
    ";": "delete it: a statement ends where the next one begins",
    "%": "there is no remainder; `//` divides and rounds down",
    "!": "write `!=` for `is not`",
    "&": "write one `expect` line for each fact",
    "\\": "delete it: a statement may go on in the next line",
    "$": "names stand alone: `d_model`, not `$d_model`",
}


class Token(NamedTuple):
    type: str
    text: str
    start: int
    end: int


@dataclass
class Tokens:
    """bad: offsets of what was reported, where a following grammar error would only repeat it.
    complete is False where a bound was hit and the rest of the text was not looked at."""

    items: list[Token] = field(default_factory=list)
    comments: list[Comment] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    complete: bool = True


@cache
def _master() -> re.Pattern:
    return re.compile(tables.load().token_regex)


def tokenize(source: Source) -> Tokens:
    text, size, ignored = source.text, len(source.text), tables.load().ignored
    match = _master().match
    out = Tokens()
    add = out.items.append
    open_brackets: list[int] = []
    at = 0
    while at < size:
        found = match(text, at)
        if found is None:
            if len(out.diagnostics) >= MAX_REPORTED:
                out.complete = False
                return out
            at = _stray(source, at, out)
            continue
        type, start, at = found.lastgroup, at, found.end()
        if type in ignored:
            if type == "COMMENT":
                line = text.rfind("\n", 0, start) + 1
                out.comments.append(
                    Comment(
                        span=Span(source, start, at),
                        text=text[start:at].rstrip(),
                        own_line=not text[line:start].strip(),
                    )
                )
            continue
        word = text[start:at]
        if type in _OPENERS:
            open_brackets.append(start)
            if len(open_brackets) > MAX_DEPTH:
                return _give_up(out, _too_deep(source, start, open_brackets[0]))
        elif type in _CLOSERS and open_brackets:
            open_brackets.pop()
        elif (type == "INT" or type == "FLOAT") and (why := out_of_range(type, word)):
            out.diagnostics.append(Diagnostic(E014, why, Span(source, start, at)))
            word = "1"
        add(Token(type, word, start, at))
        if len(out.items) > MAX_TOKENS:
            message = f"more than {MAX_TOKENS:,} words and marks"
            help = ("use repeats: `[M F]*24`",)
            return _give_up(
                out, Diagnostic(E016, message, Span(source, start, at), "from here on", help=help)
            )
    add(Token(tables.END, "", size, size))
    return out


def _give_up(out: Tokens, diagnostic: Diagnostic) -> Tokens:
    out.diagnostics.append(diagnostic)
    out.complete = False
    return out


def _too_deep(source: Source, start: int, outermost: int) -> Diagnostic:
    return Diagnostic(
        E015,
        f"brackets nest more than {MAX_DEPTH} deep",
        Span(source, start, start + 1),
        f"level {MAX_DEPTH + 1}",
        labels=(Label(Span(source, outermost, outermost + 1), "level 1"),),
        help=("name the inner part: `layer B = [M F]`",),
    )


def out_of_range(type: str, word: str) -> str | None:
    """Why an INT or FLOAT is refused, or None."""
    digits, _, exponent = word.replace("_", "").lower().partition("e")
    count = len(digits.replace(".", ""))
    if count > MAX_DIGITS:
        return f"a number with {count:,} digits; at most {MAX_DIGITS} are read"
    if type == "INT" and int(digits) > MAX_INTEGER:
        return f"`{word}` is larger than the largest whole number, 2**53 = {MAX_INTEGER:,}"
    exponent = exponent.lstrip("+-").lstrip("0")
    if len(exponent) > 3 or int(exponent or 0) > MAX_EXPONENT:
        shown = word if len(word) <= 24 else word[:20] + "..."
        return f"the exponent of `{shown}` is outside -{MAX_EXPONENT} .. {MAX_EXPONENT}"
    return None


def _stray(source: Source, at: int, out: Tokens) -> int:
    """Reports what begins at `at`, which is no token; returns where to go on."""
    text = source.text
    char = text[at]
    line_end = text.find("\n", at)
    line_end = len(text) if line_end < 0 else line_end
    if char == '"':
        end = at + len(text[at:line_end].rstrip())
        help = ('put a `"` at its end, in the same line',)
        out.diagnostics.append(Diagnostic(E013, "the string has no end", Span(source, at, end), help=help))
        out.bad.append(at)
        out.items.append(Token("STRING", text[at:end] + '"', at, end))
        return line_end
    if char in _QUOTES and (close := _closing_quote(text, at, line_end)):
        span, plain = Span(source, at, close + 1), f'"{text[at + 1 : close]}"'
        message = f"strings stand in straight double quotes, not in {_called(char)}"
        shown = plain if len(plain) <= 60 else '"..."'
        out.diagnostics.append(Diagnostic(E011, message, span, help=(f"write `{shown}`",)))
        out.items.append(Token("STRING", plain, at, close + 1))
        return close + 1
    end = at + 1
    while end < line_end and text[end] == char:
        end += 1
    span, harmless = Span(source, at, end), char.isspace() or char == ";" or _invisible(char)
    if char.isspace() or _invisible(char):
        help = ("replace it by an ordinary space",) if char.isspace() else ("delete it",)
    elif char in _LOOK_ALIKE:
        help = (f"write `{_LOOK_ALIKE[char]}`",)
    elif char.isalpha():
        help = ("names are made of a-z, A-Z, 0-9 and _",)
    else:
        help = (_HELP[char],) if char in _HELP else ()
    message = f"the language has no {_called(char)}"
    out.diagnostics.append(Diagnostic(E011, message, span, help=help))
    if not harmless:
        out.bad.append(at)
    return end


def _closing_quote(text: str, at: int, line_end: int) -> int | None:
    ends = [p for q in {_QUOTES[text[at]], text[at], '"'} if (p := text.find(q, at + 1, line_end)) > 0]
    return min(ends) if ends else None


def _invisible(char: str) -> bool:
    import unicodedata

    return unicodedata.category(char) in ("Cf", "Cc", "Co", "Cn", "Cs")


def _called(char: str) -> str:
    import unicodedata

    if "!" <= char <= "~":
        return f"`{char}`"
    name = unicodedata.name(char, "character").lower()
    shown = "" if char.isspace() or _invisible(char) else f" `{char}`"
    return f"{name}{shown} (U+{ord(char):04X})"
