"""What is known where the parser got stuck: the tokens around, what would fit, which bracket is open."""

from __future__ import annotations

from dataclasses import dataclass

from mambadsl.syntax.expected import expected, found_words
from mambadsl.syntax.parser import Failure, Parser
from mambadsl.syntax.tables import END
from mambadsl.syntax.tokens import CLOSER, Token
from mambadsl.text.diagnostic import Diagnostic, declare
from mambadsl.text.source import Source, Span

E010 = declare(
    "E010",
    "a word or mark that does not fit here",
    """
    The text up to here is fine, and nothing that it could become continues with this word. The message
    lists what could stand here. Reading goes on at the next line that begins a statement (`from`, `let`,
    `model`, `layer`, `shared`, `stack`, `mtp`, `parts`, `expect`), so each broken statement is reported once.
    """,
)
NAME_STARTS = {"NAME", "LAYER_NAME"}
VALUE_STARTS = {"NAME", "LAYER_NAME", "INT", "FLOAT", "STRING", "TRUE", "FALSE", "LSQB", "LPAR"}
OPENERS = {closer: opener for opener, closer in CLOSER.items()}


@dataclass(frozen=True)
class Stuck:
    """Where and how the parser got stuck."""

    source: Source
    tokens: list[Token]
    parser: Parser
    failure: Failure

    @property
    def accepts(self) -> frozenset[str]:
        return self.failure.accepts

    @property
    def found(self) -> Token:
        return self.tokens[self.failure.index]

    def back(self, steps: int = 1) -> Token | None:
        """A token before the one that does not fit, within the statement."""
        at = self.failure.index - steps
        return self.tokens[at] if at >= self.failure.begin else None

    @property
    def first(self) -> Token:
        return self.tokens[self.failure.begin]

    @property
    def starts_statement(self) -> bool:
        return self.failure.index in self.parser.heads

    def keyword(self, token: Token) -> bool:
        return token.type == "NAME" and token.text in self.parser.tables.keywords

    @property
    def ends_operand(self) -> bool:
        """Whether a complete value or layer stands just before."""
        before = self.back()
        return before is not None and before.type in VALUE_STARTS - {"LSQB", "LPAR"} | {"RPAR", "RSQB"}

    def opener(self) -> Token | None:
        """The innermost bracket that is open here."""
        still_open: list[Token] = []
        for token in self.tokens[self.failure.begin : self.failure.index]:
            if token.type in CLOSER:
                still_open.append(token)
            elif token.type in OPENERS and still_open:
                still_open.pop()
        return still_open[-1] if still_open else None

    def span(self, token: Token) -> Span:
        if token.type == END:  # the end of the last line that says something, not of the blanks after it
            at = self.tokens[self.failure.index - 1].end if self.failure.index else token.start
            return Span(self.source, at, at)
        return Span(self.source, token.start, token.end)

    def wrong(self, *help: str) -> Diagnostic:
        """The plain diagnostic: what was expected, what was found."""
        message = (
            f"expected {expected(self.accepts, self.parser.tables.literals)}, found {found_words(self.found)}"
        )
        return Diagnostic(E010, message, self.span(self.found), help=help)
