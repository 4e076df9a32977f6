"""Source -> File. Raises MdlError with every syntax problem of the text (codes E010 to E019)."""

from __future__ import annotations

from mambadsl.syntax import tables
from mambadsl.syntax.nodes import reducer
from mambadsl.syntax.parser import Parser
from mambadsl.syntax.tokens import MAX_REPORTED, tokenize
from mambadsl.syntax.tree import File, Pattern
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import Source


def read(source: Source) -> File:
    """The tree of a model file. Every broken statement is reported once, in the order of the text,
    and no more than MAX_REPORTED of them."""
    tokens = tokenize(source)
    problems = list(tokens.diagnostics)
    if tokens.complete:
        grammar = tables.load()
        reduce = reducer(source, keywords=grammar.keywords, problems=problems)
        parser = Parser(grammar, tokens.items, text=source.text, reduce=reduce)
        value = parser.run(most_failures=MAX_REPORTED)
        if parser.failures:
            from mambadsl.syntax import mistakes

            problems += mistakes.explain(source, tokens, parser)
    if problems:
        problems.sort(key=lambda problem: problem.span.start)
        raise MdlError(problems[:MAX_REPORTED])
    comments = tuple(tokens.comments)
    if isinstance(value, Pattern):
        return File(source=source, pattern=value, comments=comments)
    return File(source=source, statements=value, comments=comments)
