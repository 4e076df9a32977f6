"""grammars/mdl.lark -> tables for the tokenizer and the parser.

Lark reads the grammar, proves it LALR(1) and computes the tables; they are stored beside the grammar
(`python -m mambadsl.syntax.tables` writes them), so that a normal run neither imports Lark nor writes
any cache: that alone would cost more than all the rest of `check`. A table file that is missing,
damaged or made from another text of the grammar is ignored and the tables are built in memory.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache

from mambadsl.files import GRAMMARS

GRAMMAR = GRAMMARS / "mdl.lark"
STORED = GRAMMARS / "mdl.tables.json"
_FORMAT = 1

END = "$END"


@dataclass(frozen=True, slots=True)
class Rule:
    """origin starts with `_` where the rule only hands its children up. fates: for each symbol `k` keep,
    `d` drop (punctuation), `s` splice (a list from an inner `_` rule)."""

    origin: str
    fates: str


@dataclass(frozen=True, slots=True)
class Tables:
    """`actions[state][symbol]`: a state to go to, or ~rule to reduce by."""

    token_regex: str
    ignored: frozenset[str]
    keywords: dict[str, str]
    literals: dict[str, str]
    rules: tuple[Rule, ...]
    actions: tuple[dict[str, int], ...]
    start: int
    end: int


@cache
def load() -> Tables:
    """The stored tables where they fit the grammar, else new ones (needs Lark, a fifth of a second)."""
    grammar = GRAMMAR.read_text(encoding="utf-8")
    try:
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        if stored["made_from"] == _made_from(grammar):
            return _from_json(stored)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # whatever is wrong with the file, the grammar is the truth
    return _from_json(build(grammar))


def _made_from(grammar: str) -> list[int]:
    return [_FORMAT, len(grammar), zlib.crc32(grammar.encode())]


def _from_json(data: dict) -> Tables:
    return Tables(
        token_regex=data["token_regex"],
        ignored=frozenset(data["ignored"]),
        keywords=data["keywords"],
        literals=data["literals"],
        rules=tuple(Rule(*rule) for rule in data["rules"]),
        actions=tuple(data["actions"]),
        start=data["start"],
        end=data["end"],
    )


def build(grammar: str) -> dict:
    """The tables as JSON data. Lark raises GrammarError where the grammar is not LALR(1)."""
    import re

    from lark import Lark
    from lark.lexer import PatternStr
    from lark.parsers.lalr_analysis import Shift

    lark = Lark(grammar, parser="lalr")
    rules = {rule: number for number, rule in enumerate(lark.rules)}
    table = lark.parser.parser._parse_table
    # Lark numbers states differently in each process; in the order they are reached, the file is stable.
    numbers = {table.start_states["start"]: 0}
    for state in (reached := list(numbers)):
        for _, (action, argument) in sorted(table.states[state].items()):
            if action is Shift and argument not in numbers:
                numbers[argument] = len(reached)
                reached.append(argument)
    actions = [
        {
            symbol: numbers[argument] if action is Shift else ~rules[argument]
            for symbol, (action, argument) in sorted(table.states[state].items())
        }
        for state in reached
    ]

    def fate(symbol) -> str:
        if symbol.is_term:
            return "d" if symbol.filter_out else "k"
        return "s" if symbol.name.startswith("_") else "k"

    # The order Lark itself tries terminals in: the longest possible match first.
    terminals = sorted(
        lark.terminals, key=lambda t: (-t.priority, -t.pattern.max_width, -len(t.pattern.value), t.name)
    )
    words = {t.pattern.value: t.name for t in terminals if isinstance(t.pattern, PatternStr)}
    keywords = {text: name for text, name in words.items() if re.fullmatch("[a-z]+", text)}
    regexes = [(t.name, t.pattern.to_regexp()) for t in terminals if t.name not in keywords.values()]
    return {
        "made_from": _made_from(grammar),
        "token_regex": "|".join(f"(?P<{name}>{regex})" for name, regex in regexes),
        "ignored": sorted(lark.ignore_tokens),
        "keywords": keywords,
        "literals": {name: text for text, name in words.items()},
        "rules": [[rule.origin.name, "".join(map(fate, rule.expansion))] for rule in lark.rules],
        "start": numbers[table.start_states["start"]],
        "end": numbers[table.end_states["start"]],
        "actions": actions,
    }


def to_text(data: dict) -> str:
    """JSON with one rule or state a line."""

    def lines(values: list) -> str:
        return "[\n" + ",\n".join(json.dumps(value) for value in values) + "\n]"

    entries = [
        f"{json.dumps(key)}: {lines(value) if key in ('rules', 'actions') else json.dumps(value)}"
        for key, value in data.items()
    ]
    return "{\n" + ",\n".join(entries) + "\n}\n"


if __name__ == "__main__":
    STORED.write_text(to_text(build(GRAMMAR.read_text(encoding="utf-8"))), encoding="utf-8")
