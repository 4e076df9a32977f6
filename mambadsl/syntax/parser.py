"""The LALR machine: tokens and tables -> nodes, one statement's mistake at a time.

Out: the value of `start`, or None with every `Failure`. After a failure the machine starts afresh at the
next line that begins a statement, so each broken statement is reported once and nothing follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

from mambadsl.syntax.tables import END, Tables
from mambadsl.syntax.tokens import MAX_DEPTH, Token

#: keyword -> what may follow, and what may follow that, for it to begin a statement whatever the parser
#: was in the middle of: `parts = 3` is a setting, `parts h200 {` is not. At the start of a line the first
#: of them is enough.
_NAMED = {"NAME", "LAYER_NAME"}
HEADS: dict[str, tuple[set[str], set[str]]] = {
    "from": ({"STRING"}, {"NAME"}),
    "let": (_NAMED, {"EQUAL"}),
    "model": (_NAMED, {"LBRACE"}),
    "layer": (_NAMED, {"EQUAL"}),
    "shared": (_NAMED, {"EQUAL"}),
    "stack": ({"LBRACE"}, _NAMED | {"LSQB", "VBAR", "RBRACE"}),
    "mtp": ({"LBRACE", "LPAR"}, _NAMED | {"LSQB"}),
    "parts": (_NAMED, {"LBRACE", "COLON"}),
    "expect": (_NAMED | {"INT", "FLOAT"}, {"COMPARE", "LPAR"}),
}
#: After these a word must still come, so a line's first keyword counts only where both tokens agree.
_UNFINISHED = frozenset(
    {"EQUAL", "PLUS", "MINUS", "STAR", "SLASH", "FLOOR", "COMPARE", "COMMA", "LPAR", "LSQB"}
)
_DEEPER = frozenset({"add", "mul", "negative", "args", "list", "paren", "group"})


@dataclass(frozen=True, slots=True)
class Failure:
    """begin: index of the first token of the broken statement; index: of the token that does not fit;
    accepts: what would fit there. too_deep: the text fits but nests too deep (index is where)."""

    begin: int
    index: int
    accepts: frozenset[str]
    too_deep: bool = False


class Parser:
    """reduce(origin, children, start, end) makes the node of one rule from the children it keeps."""

    def __init__(self, tables: Tables, tokens: list[Token], *, text: str, reduce: Callable[..., Any]):
        self.tables = tables
        self.tokens = tokens
        self.reduce = reduce
        self.heads = [i for i in range(len(tokens) - 1) if self._is_head(text, i)]
        self._at_head = frozenset(self.heads)
        self.failures: list[Failure] = []

    def run(self, *, most_failures: int) -> Any:
        result, at = None, 0
        while at is not None and len(self.failures) < most_failures:
            result, at = self._parse_from(at)
        return None if self.failures else result

    def _parse_from(self, begin_at: int) -> tuple[Any, int | None]:
        """Parses to the end, or to a failure: then the second value is where to start again."""
        tables, tokens, reduce = self.tables, self.tokens, self.reduce
        rules, actions, keywords = tables.rules, tables.actions, tables.keywords
        states, values, depths, firsts = [tables.start], [], [], []
        at = begin_at
        while True:
            token = tokens[at]
            type = token[0]
            if type == "NAME" and token[1] in keywords:
                type = self._word(states, at)
            while (action := actions[states[-1]].get(type)) is None or action < 0:
                if action is None:
                    if type == END and states[-1] == tables.end:
                        return values[0], None
                    return None, self._fail(at, at, self._accepted(begin_at, at), states, firsts)
                rule = rules[~action]
                origin, size = rule.origin, len(rule.fates)
                depth = max(depths[-size:])
                if origin in _DEEPER:
                    depth += 1
                    if depth > MAX_DEPTH:
                        return None, self._fail(at, firsts[-size], None, states, firsts)
                children = _children(rule.fates, values[-size:])
                if origin[0] != "_":
                    children = reduce(origin, children, tokens[firsts[-size]][2], tokens[at - 1][3])
                if size > 1:
                    del states[1 - size :], values[1 - size :], depths[1 - size :], firsts[1 - size :]
                states.pop()
                values[-1], depths[-1] = children, depth
                states.append(actions[states[-1]][origin])
            states.append(action)
            values.append(token)
            depths.append(0)
            firsts.append(at)
            at += 1

    def _fail(self, at: int, index: int, accepts: frozenset[str] | None, states, firsts) -> int | None:
        """Notes the failure; returns the next head to start again at, if there is one."""
        after_statements = len(states) > 1 and self.tables.actions[states[1]].get("LET", -1) >= 0
        inner = firsts[1:] if after_statements else firsts
        begin = inner[0] if inner else at
        self.failures.append(Failure(begin, index, accepts or frozenset(), too_deep=accepts is None))
        return next((i for i in self.heads if i >= at and i > begin), None)

    def _accepted(self, begin_at: int, at: int) -> frozenset[str]:
        """The terminals that fit after the tokens before `at`. Replays them, since the token that did not
        fit has already caused reductions which other tokens would not."""
        rules, actions = self.tables.rules, self.tables.actions
        states = [self.tables.start]
        for i in range(begin_at, at):
            type, text = self.tokens[i][:2]
            if type == "NAME" and text in self.tables.keywords:
                type = self._word(states, i)
            while (action := actions[states[-1]][type]) < 0:
                rule = rules[~action]
                del states[-len(rule.fates) :]
                states.append(actions[states[-1]][rule.origin])
            states.append(action)
        return frozenset(s for s in actions[states[-1]] if s.isupper() and self._accepts(states, s))

    def _accepts(self, states: list[int], type: str) -> bool:
        """Whether a token of this type would be shifted after all the reductions it causes."""
        rules, actions, end = self.tables.rules, self.tables.actions, self.tables.end
        states = list(states)
        while (action := actions[states[-1]].get(type)) is not None and action < 0:
            rule = rules[~action]
            del states[-len(rule.fates) :]
            states.append(actions[states[-1]][rule.origin])
        return action is not None or (type == END and states[-1] == end)

    def _word(self, states: list[int], at: int) -> str:
        """A word that is also a keyword: the keyword where a statement may begin or goes on, else a name."""
        text = self.tokens[at].text
        keyword = self.tables.keywords[text]
        listed = False
        if at > 0 and self.tokens[at - 1].type == "COMMA" and text in HEADS:  # ... import M, model
            listed = self.tokens[at + 1].type in {"COMMA", END} or at + 1 in self._at_head
        if at in self._at_head or (self._accepts(states, keyword) and not listed):
            return keyword
        return "NAME" if self._accepts(states, "NAME") else keyword

    def _is_head(self, text: str, i: int) -> bool:
        token = self.tokens[i]
        if token.type != "NAME" or token.text not in HEADS:
            return False
        second, third = HEADS[token.text]
        if self.tokens[i + 1].type not in second:
            return False
        if i == 0:
            return True
        before = self.tokens[i - 1]
        if before.type in {"DOT", "COLON"} or before.text in HEADS:
            return False
        clear = "\n" in text[before.end : token.start] and before.type not in _UNFINISHED
        return clear or self.tokens[i + 2].type in third


def _children(fates: str, values: list) -> list:
    """The kept values; those of an inner rule in their place. Its list has no other owner, so the first
    one is extended in place: that keeps a long pattern linear."""
    children: list | None = None
    for fate, value in zip(fates, values, strict=True):
        if fate == "s":
            if children is None:
                children = value
            else:
                children += value
        elif fate == "k":
            if children is None:
                children = [value]
            else:
                children.append(value)
    return [] if children is None else children
