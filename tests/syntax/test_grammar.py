"""The grammar file, and our machine held against Lark's own parser."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from lark import Lark, Token, UnexpectedInput, UnexpectedToken

from mambadsl.files import GRAMMARS
from mambadsl.syntax import tables
from mambadsl.syntax.parser import HEADS, Parser
from mambadsl.syntax.tokens import tokenize
from mambadsl.text.source import from_text

TEXT = (GRAMMARS / "mdl.lark").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lark():
    pytest.importorskip("interegular")  # what strict mode needs to find terminals that overlap
    return Lark(TEXT, parser="lalr", strict=True)


@pytest.fixture
def fresh():
    tables.load.cache_clear()
    yield
    tables.load.cache_clear()


def test_the_grammar_is_lalr1_without_conflicts(lark):
    assert lark.parse("M M A").data == "start"


def test_the_stored_tables_are_those_of_the_grammar():
    assert tables.STORED.read_text(encoding="utf-8") == tables.to_text(tables.build(TEXT))


def test_every_statement_keyword_has_a_head():
    keywords = set(tables.load().keywords)
    assert keywords == set(HEADS) | {"import", "true", "false"}


def test_no_rule_is_empty():
    assert all(rule.fates for rule in tables.load().rules)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"made_from": [1', '"made_from": [0'),
        lambda text: "[]",
        lambda text: json.dumps({"made_from": json.loads(text)["made_from"]}),
    ],
    ids=["empty", "cut", "old", "foreign", "incomplete"],
)
def test_a_damaged_table_file_is_replaced_in_memory(damage, tmp_path, monkeypatch, fresh):
    good = tables.load()
    path = tmp_path / "mdl.tables.json"
    path.write_text(damage(tables.STORED.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(tables, "STORED", path)
    tables.load.cache_clear()
    assert tables.load() == good


def test_a_missing_table_file_is_replaced_in_memory(tmp_path, monkeypatch, fresh):
    good = tables.load()
    monkeypatch.setattr(tables, "STORED", tmp_path / "nowhere" / "tables.json")
    tables.load.cache_clear()
    assert tables.load() == good


SAMPLES = [
    "M M M A M M M A",
    "[M F]*3 M A F | retention(heads=16) M+A+[M F] A(window=2 * -d_model + (3 - 1), f=[1, A(x=true), x.y])",
    'from "a.mdl" import M, te8,\nlet x = 1e-5 // 3\nmodel m { a = "b" norm = rmsnorm(eps=1e-5) }',
    "layer M = mamba2(heads=8,)\nshared S = [M A]*2\nstack { | M S |\n}\nmtp(depths=2) { A }\nmtp { M }",
    "parts p { }\nparts q : a.b { A.core = x\n mamba2.scan = y.z(w=1) }\nexpect count(mamba2) * 2 >= 3 + 1",
]


def shape(node) -> object:
    """A Lark tree as nested lists; positions and punctuation left out."""
    return str(node) if isinstance(node, Token) else [str(node.data), *map(shape, node.children)]


def ours(text: str):
    tokens = tokenize(from_text(text))

    def reduce(origin, children, start, end):
        return [origin, *(c if isinstance(c, list) else c.text for c in children)]

    parser = Parser(tables.load(), tokens.items, text=text, reduce=reduce)
    return parser.run(most_failures=1), parser


@pytest.mark.parametrize("text", SAMPLES)
def test_the_machine_builds_the_tree_that_lark_builds(lark, text):
    plain = Lark(TEXT, parser="lalr", maybe_placeholders=False)
    assert ours(text)[0] == shape(plain.parse(text))


@pytest.mark.parametrize("text", SAMPLES)
def test_the_machine_gives_the_verdicts_of_lark(lark, text):
    """Each prefix, and each deletion of one token: the same verdict, at the same token. Only at a word
    that is also a keyword may ours differ, since Lark decides about such words without looking around."""
    tokens = tokenize(from_text(text)).items[:-1]
    refused = 0
    for i in range(len(tokens)):
        for kept in (tokens[:i], tokens[:i] + tokens[i + 1 :]):
            broken = " ".join(token.text for token in kept)
            value, parser = ours(broken)
            try:
                lark.parse(broken)
                theirs = None
            except UnexpectedInput as error:
                at_end = isinstance(error, UnexpectedToken) and error.token.type == "$END"
                theirs = len(broken) if at_end else error.pos_in_stream
            if not parser.failures:
                listed = kept and kept[-1].text in tables.load().keywords  # import M, let: a name, E017 later
                assert (theirs is None or listed) and value is not None, broken
                continue
            refused += 1
            failure = parser.failures[0]
            at = failure.index
            words = {token.text for token in parser.tokens[max(at - 1, 0) : at + 1]}
            assert theirs == parser.tokens[at].start or words & set(tables.load().keywords), broken
            if theirs == len(broken):
                assert failure.accepts and "$END" not in failure.accepts, broken
    assert refused


def test_a_normal_run_does_not_import_lark():
    program = (
        "import sys; from mambadsl.syntax.read import read; from mambadsl.text.source import from_text;"
        "read(from_text('M M A')); print([m for m in sys.modules if m.split('.')[0] in ('lark', 'torch')])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
