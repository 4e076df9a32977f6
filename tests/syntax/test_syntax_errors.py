"""Every syntax mistake: its code, its exact place (between « and »), and what the message says."""

from __future__ import annotations

import pytest

from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import CODES, MdlError
from mambadsl.text.render import to_text
from mambadsl.text.source import from_text

DEEP = "[" * 64

#: code, text with the guilty place marked, words that the rendered message must contain
MISTAKES = [
    ("E010", "layer A = attention(heads=8 «kv_heads»=2)", ["`)` or `,`, found `kv_heads`", "put a `,`"]),
    ("E010", "layer A = attention(heads=8 «\"x\"»)", ["put a `,`"]),
    ("E010", "M (M «+» A)", ["`( )` holds arguments", "[M+A]"]),
    ("E010", "M (M «A»)", ["`( )` holds arguments", "[M A]"]),
    ("E010", "«(»M A)*3", ["`( )` holds arguments"]),
    ("E010", "M+A«*»2", ["needs a group: `[M+A]*2`"]),
    ("E010", "M M+te.mix(x=1)«*»4", ["`[M+te.mix(x=1)]*4`"]),
    ("E010", "M*2«*»3", ["`[M*2]*3`"]),
    ("E010", "layer B = [M F]+A«*»3", ["`[[M F]+A]*3`"]),
    ("E010", "layer X = M «F»", ["are a group: `[M F]`"]),
    ("E010", "M«**»3", ["one star: `M*3`"]),
    ("E010", "let x = 2«**»3", ["no power"]),
    ("E010", "expect layers «=» 3", ["to compare, write `==`"]),
    ("E010", "expect layers «=»> 3", ["write `>=`"]),
    ("E010", "layer M «==» mamba2(heads=3)", ["write `=`"]),
    ("E010", "layer M = f(a«:» 3)", ["write `=`"]),
    ("E010", "model m {\n  a«:» 3\n}", ["write `=`"]),
    ("E010", "model m «=» { a = 3 }", ["no `=` stands before `{`"]),
    ("E010", "model m {\n  a = 3«,»\n  b = 4\n}", ["delete it: commas"]),
    ("E010", "M«,»M,A", ["side by side"]),
    ("E010", "«»", ["the file says nothing", "M M M A"]),
    ("E010", "# only a comment«»", ["the file says nothing"]),
    ("E010", "«lyer» A = attention(heads=2)", ["did you mean `layer`?"]),
    ("E010", "«Layer» A = attention(heads=2)", ["did you mean `layer`?"]),
    ("E010", "let a = 1\n«modle» m { a = 3 }", ["did you mean `model`?"]),
    ("E010", "d_model «=» 4096", ["let d_model = ...", "model NAME { d_model = ... }"]),
    ("E010", "let a = 1\n«M» M A", ["stands in `stack { ... }`"]),
    ("E010", "M M A\n«expect» layers == 3", ["stands in `stack { ... }`"]),
    ("E010", "let a = «4k»", ["no suffix"]),
    ("E010", "«//» a comment\nM M", ["begins with `#`"]),
    ("E010", "stack «M» M A", ["expected `{`, found `M`"]),
    ("E010", "stack { «}»", ["expected a layer or a group, found `}`"]),
    ("E010", "let a = 1 +«»", ["expected a value, found the end of the file"]),
    ("E010", "let a = 1 + # more\n«let» b = 2", ["expected a value, found `let`"]),
    ("E010", "layer «stack» = M", ["expected a layer's name, found `stack`"]),
    ("E010", "from «x» import M", ["expected a string"]),
    ("E010", "M*«A»", ["expected a whole number"]),
    ("E011", "let x = 3«;»", ["delete it"]),
    ("E011", "let x«\u00a0»= 3", ["no-break space (U+00A0)", "ordinary space"]),
    ("E011", "M «\u200b»A", ["zero width space (U+200B)", "delete it"]),
    ("E011", "let x = «“abc”»", ["straight double quotes", '`"abc"`']),
    ("E011", "from «'abc'» import M", ["straight double quotes", '`"abc"`']),
    ("E011", "let x = 3 «−» 2", ["minus sign", "write `-`"]),
    ("E011", "let x = «@»", ["no `@`"]),
    ("E011", "let x = 7 «%» 2", ["no remainder"]),
    ("E011", "let «é»toile = 3", ["a-z"]),
    ("E012", "layer A = attention(heads=8\n«layer» F = mlp(d_ff=3)", ["`(` is not", "this `(` is open"]),
    ("E012", "stack {\n  M F\n«expect» layers == 2", ["`{` is not closed", "this `{` is open"]),
    ("E012", "[M F«»", ["`[` is not closed", "before the end of the file"]),
    ("E012", "stack { M «]» F }", ["to close `{`", "this `{` is open"]),
    ("E012", "stack { [M F «}»", ["to close `[`"]),
    ("E012", "M «]» F", ["closes nothing"]),
    ("E012", "layer A = B(window=3)«)»", ["closes nothing"]),
    ("E013", 'from «"abc import M»', ["no end"]),
    ("E013", 'let a = «"x»\nlet b = 3', ["no end"]),
    ("E014", "let a = «99999999999999999999999»", ["23 digits"]),
    ("E014", "let a = «9007199254740993»", ["2**53"]),
    ("E014", "let a = «1e999999999»", ["exponent"]),
    ("E014", "let a = «1e-309»", ["exponent"]),
    ("E014", "M*«99999999999999999999999»", ["23 digits"]),
    ("E015", DEEP + "«[»M", ["level 65", "level 1"]),
    ("E015", "let x = " + "(" * 64 + "«(»1", ["64 deep"]),
    ("E015", "let x = " + "-" * 36 + "«-»" + "-" * 64 + "1", ["64 deep"]),
    ("E015", "let x = «1»" + "+1" * 65, ["64 deep"]),
    ("E017", "let «layer» = 3", ["is a keyword"]),
    ("E017", "model «stack» { }", ["is a keyword"]),
    ("E017", "parts «true» { }", ["is a keyword"]),
    ("E017", 'from "a" import M, «model»', ["is a keyword"]),
    ("E018", "layer «m» = mamba2(heads=2)", ["starts upper case", "write `M`"]),
    ("E018", "shared «s» = f(a=1)", ["write `S`"]),
    ("E018", "«m» M A", ["neither a layer nor a kind", "`M`"]),
    ("E018", "stack { M «mamba2» M }", ["a kind in a pattern has arguments: `mamba2(...)`"]),
    ("E018", "let «Big» = 3", ["write `big`"]),
    ("E018", "model m {\n  «D_model» = 3\n}", ["write `d_model`"]),
    ("E018", "let x = 2 * «Width»", ["write `width`"]),
    ("E019", "«M-M*-»", ["Megatron pattern", "write `M F M A F`", "`*` attention"]),
    ("E019", "stack {\n  «M-M*-»\n}", ["write `M F M A F`"]),
    ("E019", "«MEMEM*E»", ["write `M E M E M A E`"]),
    ("E019", "«MMM*»", ["write `M M M A`"]),
    ("E019", "«M-M*-|M-M*-/MM/MM»", ["stack { M F M A F | M F M A F }", "mtp(depths=2) { M M }"]),
]  # fmt: skip


def problems(text: str):
    with pytest.raises(MdlError) as caught:
        read(from_text(text, name="bad.mdl"))
    return caught.value.diagnostics


@pytest.mark.parametrize("code, marked, says", MISTAKES, ids=[m[1].replace("\n", " ")[:40] for m in MISTAKES])
def test_one_mistake_one_exact_error(code, marked, says):
    start = marked.index("«")
    end = marked.index("»") - 1
    (problem,) = problems(marked.replace("«", "").replace("»", ""))
    text = to_text(problem)
    assert problem.code.id == code, text
    assert (problem.span.start, problem.span.end) == (start, end), text
    for words in says:
        assert words in text, text


def test_too_many_tokens():
    (problem,) = problems("M " * 40_001)
    assert problem.code.id == "E016" and problem.span.start == 80_000
    read(from_text("M " * 40_000))


def test_every_code_of_this_floor_has_a_mistake_above():
    ours = {id for id in CODES if "E010" <= id <= "E019"}
    assert ours == {code for code, *_ in MISTAKES} | {"E016"}
    assert all(len(CODES[id].story) > 60 for id in ours)


MANY = """\
# Seven mistakes.
lat window = 4 * 1024
model m {
  d_model = 4096
  vocab 131072
}
layer M = mamba2(heads=128 head_dim=64)
layer A = attention(heads=32, kv_heads=8
layer F = mlp(d_ff=21504, act=“relu2”)
layer w = A(window=window)
stack {
  [M F]*3 M+A*2
}
let good = 3
expect layers = 52
"""


def test_several_mistakes_are_reported_once_each(golden):
    found = problems(MANY)
    assert [(p.code.id, p.span.line) for p in found] == [
        ("E010", 2), ("E010", 5), ("E010", 7), ("E012", 9), ("E011", 9), ("E018", 10), ("E010", 12),
        ("E010", 15),
    ]  # fmt: skip
    golden("syntax_errors.txt", "\n".join(map(to_text, found)) + "\n")


def test_words_are_keywords_only_where_a_statement_may_begin():
    text = "model m {\n  parts = 3\n  stack = 4\n  expect = mtp\n}\n"
    text += "layer M = f(model=4, layer=[let], x=shared)\nmtp { M }"
    file = read(from_text(text))
    assert [s.name.text for s in file.statements[0].settings] == ["parts", "stack", "expect"]
    assert [a.name.text for a in file.statements[1].item.args] == ["model", "layer", "x"]


def test_one_statement_may_follow_another_in_a_line():
    file = read(from_text("let a = 1 let b = a layer M = f(x=a) stack { M } expect layers == 1"))
    assert len(file.statements) == 5
