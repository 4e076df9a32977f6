"""Random files: what the formatter keeps, and that no input gets past the reader as anything but MdlError."""

from __future__ import annotations

import random
import re
import time

import pytest

from mambadsl.syntax.read import read
from mambadsl.syntax.write import WIDTH, write
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.render import to_github, to_json, to_text
from mambadsl.text.source import from_text


class Author:
    """Writes random, syntactically correct files as lists of tokens."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def some(self, make, low: int, high: int) -> list:
        return [make() for _ in range(self.random.randint(low, high))]

    def word(self) -> str:
        words = "d_model heads kv_heads window rope relu2 te linear x none parts model layer_norm".split()
        return self.random.choice(words)

    def declared(self) -> str:
        return self.random.choice("window expert long_hybrid h200 d_ff a".split())

    def layer(self) -> str:
        return self.random.choice("M A F E Local Block_2 W X9".split())

    def dotted(self) -> list[str]:
        return ".".join(self.some(self.word, 1, 2)).replace(".", " . ").split()

    def commas(self, items: list[list[str]]) -> list[str]:
        out = [token for item in items for token in (*item, ",")]
        return out if out and self.random.random() < 0.2 else out[:-1]

    def args(self, depth: int) -> list[str]:
        def arg() -> list[str]:
            value = self.value(depth - 1)
            return [self.word(), "=", *value] if self.random.random() < 0.8 else value

        return ["(", *self.commas(self.some(arg, 0, 3)), ")"]

    def value(self, depth: int) -> list[str]:
        pick = self.random.random()
        if depth > 0 and pick < 0.1:
            return ["[", *self.commas(self.some(lambda: self.value(depth - 1), 0, 3)), "]"]
        if depth > 0 and pick < 0.2:
            return [self.layer(), *(self.args(depth) if pick < 0.15 else [])]
        return self.sum(depth)

    def sum(self, depth: int) -> list[str]:
        pick = self.random.random()
        if depth > 0 and pick < 0.2:
            return [
                *self.sum(depth - 1),
                self.random.choice(["+", "-", "*", "/", "//"]),
                *self.sum(depth - 1),
            ]
        if depth > 0 and pick < 0.25:
            return ["-", *self.sum(depth - 1)]
        if depth > 0 and pick < 0.35:
            return ["(", *self.sum(depth - 1), ")"]
        if depth > 0 and pick < 0.5:
            return [*self.dotted(), *self.args(depth)]
        words = ["3", "131_072", "1e-5", "2.50", "10_000", "true", "false", '"a # b"', '"std/base.mdl"']
        return [self.random.choice(words)] if pick < 0.8 else self.dotted()

    def unit(self, depth: int) -> list[str]:
        pick = self.random.random()
        if depth > 0 and pick < 0.25:
            return ["[", *self.pattern(depth - 1, 4), "]"]
        if depth > 0 and pick < 0.35:
            return [*self.random.choice([["retention"], ["my", ".", "mixer"]]), *self.args(depth)]
        return [self.layer(), *(self.args(depth) if depth > 0 and pick < 0.5 else [])]

    def item(self, depth: int) -> list[str]:
        pick, unit = self.random.random(), self.unit(depth)
        if pick < 0.25:
            return [*unit, "*", str(self.random.randint(1, 60))]
        if pick < 0.4:
            return [*unit, *(t for u in self.some(lambda: self.unit(depth), 1, 2) for t in ("+", *u))]
        return ["|"] if pick > 0.95 else unit

    def pattern(self, depth: int, most: int = 9) -> list[str]:
        return [token for item in self.some(lambda: self.item(depth), 1, most) for token in item]

    def statement(self) -> list[str]:
        def setting() -> list[str]:
            return [self.word(), "=", *self.value(2)]

        def slot() -> list[str]:
            tail = self.args(1) if self.random.random() < 0.3 else []
            return [self.random.choice(["mamba2", "W"]), ".", self.word(), "=", *self.dotted(), *tail]

        match self.random.randrange(9):
            case 0:
                return [
                    "from",
                    '"x.mdl"',
                    "import",
                    *self.commas([["M"], ["h200"], *self.some(lambda: ["A"], 0, 2)]),
                ]
            case 1:
                return ["let", self.declared(), "=", *self.value(3)]
            case 2:
                return ["model", self.declared(), "{", *(t for s in self.some(setting, 0, 4) for t in s), "}"]
            case 3 | 4:
                return [self.random.choice(["layer", "shared"]), self.layer(), "=", *self.no_cut()]
            case 5:
                return ["stack", "{", *self.pattern(3), "}"]
            case 6:
                return ["mtp", *self.random.choice([[], self.args(1)]), "{", *self.pattern(1), "}"]
            case 7:
                base = [":", *self.dotted()] if self.random.random() < 0.5 else []
                return [
                    "parts",
                    self.declared(),
                    *base,
                    "{",
                    *(t for s in self.some(slot, 0, 3) for t in s),
                    "}",
                ]
            case _:
                return ["expect", *self.sum(1), self.random.choice(["==", "<=", "<"]), *self.sum(1)]

    def no_cut(self) -> list[str]:
        while (item := self.item(2)) == ["|"]:
            pass
        return item

    def file(self) -> list[str]:
        if self.random.random() < 0.2:
            return self.pattern(3)
        return [token for statement in self.some(self.statement, 1, 6) for token in ("\n", *statement)]

    def scatter(self, tokens: list[str], comments: float) -> tuple[str, list[str]]:
        """The tokens as text with random blanks, line breaks and comments between any two."""
        out, written = [], []
        for token in tokens:
            gap = self.random.choice([" ", "  ", " ", "\t", "\n", "\n\n", " \n\n\n  ", "\n  "])
            if self.random.random() < comments:
                says = self.random.choice(["note", "} ) ] [ { (", "let x = 3", ""])
                comment = f"# {len(written)} {says}".rstrip()
                written.append(comment)
                gap = self.random.choice(["", " ", "\n", "\n\n"]) + comment + "\n" + gap
            out += [gap, "" if token == "\n" else token]
            if token == "\n":
                out.append("\n")
        return "".join(out), written


def spelled(text: str):
    return read(from_text(text, name="fuzz.mdl"))


@pytest.mark.parametrize("comments", [0.0, 0.03, 0.4])
def test_the_formatter_keeps_the_tree_and_every_comment_and_is_idempotent(comments):
    for seed in range(700):
        author = Author(seed)
        text, written = author.scatter(author.file(), comments)
        file = spelled(text)
        assert [c.text for c in file.comments] == written
        once = write(file)
        again = spelled(once)
        assert again == file, text
        assert sorted(c.text for c in again.comments) == sorted(written), text
        assert write(again) == once, text
        assert "\n\n\n" not in once and not re.search(r"[ \t]\n", once), text


def test_lines_stay_within_the_width_but_for_marks_behind_the_last_word():
    for seed in range(400):
        author = Author(seed)
        text, _ = author.scatter(["stack", "{", *author.pattern(2, 60), "}"], 0)
        for line in write(spelled(text)).splitlines():
            body = line.rstrip("[](){},+*| 0123456789")
            assert len(body) <= WIDTH or not re.search(r"[\w\])] [\w\[]|\w=\w", body[len(body) - WIDTH :]), (
                line
            )


JUNK = [
    *'()[]{},.:|+-*/=<#";@3Mx\n',
    "//",
    "==",
    "1e9",
    "layer",
    "stack",
    "model",
    "\u00a0",
    "\u201c",
    "\u00e4",
]


def mutated(author: Author, tokens: list[str]) -> str:
    pick, choice = author.random.random, author.random.choice
    if pick() < 0.5:
        for _ in range(author.random.randint(1, 4)):
            at = author.random.randrange(len(tokens) + 1)
            what = pick()
            if what < 0.4:
                tokens.insert(at, choice(JUNK))
            elif what < 0.8 and tokens:
                del tokens[min(at, len(tokens) - 1)]
            else:
                tokens[at:at] = tokens[: author.random.randrange(6)]
        return author.scatter(tokens, 0.02)[0]
    text = " ".join(tokens)
    for _ in range(author.random.randint(1, 5)):
        at = author.random.randrange(len(text) + 1)
        char = choice(
            ["", "\x01", "\u200b", "\U0001f600", "\ufeff", "\t", "\x7f", "\r", *'MA*-+/|()[]{}"=.,:;#0_e9\n']
        )
        text = text[:at] + char + text[at + author.random.randrange(3) :]
    return text


def test_any_input_is_read_or_refused_with_places_inside_the_text():
    refused = 0
    for seed in range(8_000):
        author = Author(seed)
        source = from_text(
            mutated(author, author.statement() if seed % 3 else author.pattern(2)), name="fuzz.mdl"
        )
        try:
            read(source)
        except MdlError as error:
            refused += 1
            assert error.diagnostics
            for diagnostic in error.diagnostics:
                spans = [diagnostic.span, *(label.span for label in diagnostic.labels)]
                assert all(0 <= span.start <= span.end <= len(source.text) for span in spans), source.text
                assert diagnostic.message and "None" not in diagnostic.message
                assert "fuzz.mdl" in to_text(diagnostic)
                assert to_json(diagnostic)["line"] >= 1 and "\n" not in to_github(diagnostic)
    assert 4_000 < refused < 8_000


def test_pure_garbage_is_refused_without_a_crash():
    for seed in range(2_000):
        pick = random.Random(seed)
        alphabet = pick.choice(
            [" MAF*+|[]()", "\x01\x02~^&%$", "abc =(){},.\n", "".join(map(chr, range(32, 400)))]
        )
        text = "".join(pick.choice(alphabet) for _ in range(pick.randrange(60)))
        try:
            file = spelled(text)
        except MdlError as error:
            assert str(error)
        else:
            assert spelled(write(file)) == file


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "M " * 130_000,
        "M" * 250_000,
        "M(" * 80_000,
        "let x = " + "-" * 200_000 + "1",
        "let x = " + "1+" * 100_000 + "1",
        "let x = " + "(" * 100_000,
        "let x = " + "9" * 200_000,
        "let x = 1e" + "9" * 200_000,
        "@" * 200_000,
        "@ " * 100_000,
        "\n@" * 100_000,
        '"' * 200_000,
        "layer\n" * 39_999,
        "let let\n" * 19_000,
        "let x = 3 )\n" * 6_000,
        "\u00a0\u200b" * 60_000,
        "M-" * 100_000,
        "#" * 200_000,
    ],
    ids=lambda text: repr(text[:14]),
)
def test_hostile_text_is_answered_in_good_time(text):
    source = from_text(text)
    start = time.thread_time()
    try:
        read(source)
    except MdlError as error:
        assert len(error.diagnostics) <= 50
        assert len(str(error)) < 60_000
    assert time.thread_time() - start < 3.0  # measured: all below 0.7 s; slow machines get some room
