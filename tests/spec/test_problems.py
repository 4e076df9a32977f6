"""Every problem of names and values: its code, its exact place (between « and »), and what the message says."""

from __future__ import annotations

import pytest

from mambadsl.graph.unroll import unroll
from mambadsl.spec import codes
from mambadsl.spec.overrides import override
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import CODES, MdlError
from mambadsl.text.render import to_text
from mambadsl.text.source import from_text

#: code, text with the guilty place marked, words that the rendered message must contain
PROBLEMS = [
    # layers and kinds
    ("E020", "«MMMA»", ["no layer `MMMA`", "did you mean `M M M A`?", "separated by spaces"]),
    ("E020", "layer Local = mamba2() stack { «Locl» }", ["did you mean `Local`?"]),
    ("E020", "layer W = mamba2() stack { W «Q» }", ["layers here: W", "std.mdl: M, A, S, F, E"]),
    ("E020", "stack { M «Q»(heads=3) }", ["declare it: `layer Q = mamba2(...)`"]),
    ("E020", "layer B = [M «Q»] stack { B }", ["no layer `Q`"]),
    ("E021", "stack { M «mamba9»(heads=2) }", ["no kind `mamba9`", "did you mean `mamba"]),
    ("E021", "layer M = «te.linear»() stack { M }", ["no kind `te.linear`"]),
    ("E021", "layer X = «zzzzzz»() stack { X }", ["kinds: attention, cca, channel_mix"]),
    ("E022", "layer M = mamba2(«headz»=4) stack { M }", ["`mamba2` has no field `headz`", "`heads`"]),
    ("E022", "layer M = mamba2(«ssm_state_size»=4) stack { M }", ["did you mean `d_state`?"]),
    ("E022", "stack { A(«chunk»=4) }", ["`A` (a `attention`) has no field `chunk`"]),
    ("E022", "layer X = M + A stack { X(«heads»=4) }", ["the sum `X` has no field `heads`", "`norm`"]),
    ("E022", "stack { M } mtp(«depth»=2) { M }", ["`mtp` has no field `depth`", "`depths`"]),
    ("E023", "model m { «hidden_size» = 64 } stack { M }", ["the model has no setting", "`d_model`?"]),
    # declarations
    ("E024", "layer W = M layer «W» = A stack { W }", ["`W` is declared twice", "first declared here"]),
    ("E024", "let a = 1 let «a» = 2 stack { M }", ["`a` is declared twice"]),
    ("E024", 'from "std/tiny.mdl" import M layer «M» = A stack { M }', ["declared twice"]),
    ("E024", 'layer M = F from "std/tiny.mdl" import «M» stack { M }', ["twice"]),
    (
        "E025",
        "let «a» = b let b = a + 1 stack { M }",
        ["`a` is defined by itself", "needs `b`", "which needs `a`"],
    ),
    ("E025", "let «a» = max(1, [2], a) stack { M }", ["needs itself"]),
    ("E025", "model m { «d_model» = w } let w = d_model stack { M }", ["`d_model` is defined by itself"]),
    ("E025", "layer «W» = [M X] layer X = W stack { X }", ["`W` is built from itself", "which needs `W`"]),
    ("E025", "stack { M } parts «p» : q {} parts q : p {}", ["`p` is based on itself"]),
    ("E026", "model m {} «model k {}» stack { M }", ["one `model`", "the first one"]),
    ("E026", "stack { M } «stack { A }»", ["one `stack`"]),
    ("E026", "stack { M } mtp { M } «mtp { A }»", ["one `mtp`"]),
    ("E026", "stack { M } parts p {} parts «p» {}", ["parts `p` stand twice", "the first one"]),
    ("E026", "stack { M } parts «fused» {}", ["`fused` is a part set already", "my_fused : fused"]),
    ("E027", 'from "std/tiny.mdl" import «Q» stack { Q }', ["declares no `Q`"]),
    ("E027", 'from "std/std.mdl" import «Mm» stack { M }', ["it declares M, A, S, F, E"]),
    ("E028", "stack { M } parts p : «fusd» {}", ["no part set `fusd`", "did you mean `fused`?"]),
    (
        "E028",
        "stack { M } parts p { «mamba2.scann» = a }",
        ["no slot `scann`", "did you mean `mamba2.scan`?"],
    ),
    ("E028", "stack { M } parts p { «scan» = a }", ["names no slot", "`mamba2.scan`"]),
    ("E028", "stack { M } parts p { «A».core = a }", ["no layer of the model is a `A`"]),
    ("E028", "layer B = [M A] stack { B } parts p { «B».core = a }", ["`B` is not a single layer"]),
    ("E021", "stack { M } parts p { «mamba9».scan = a }", ["no kind `mamba9`"]),
    ("E020", "stack { M } parts p { «Q».scan = a }", ["no layer `Q`"]),
    ("E042", "stack { M } parts p { mamba2.scan = a «mamba2.scan» = b }", ["given twice", "first here"]),
    # imports (without a folder; the rest is in test_imports)
    ("E030", 'from «"x.mdl"» import M stack { M }', ["nothing to import from", "`std/...`"]),
    ("E030", 'from «"std/tinny.mdl"» import M stack { M }', ["no file", 'did you mean "std/tiny.mdl"?']),
    ("E031", 'from «"std/../pyproject.toml"» import M stack { M }', ["inside the project's folder"]),
    # values
    (
        "E040",
        "layer M = mamba2(heads=«4096 / 24») stack { M }",
        ["whole number; 512/3 is not", "170 and 171"],
    ),
    (
        "E040",
        "layer M = mamba2(heads=«0») stack { M }",
        ["`heads` must be at least 1, not 0", "the least is 1"],
    ),
    ("E040", "layer M = mamba2(heads=«1e300») stack { M }", ["at most 1,099,511,627,776, not 1e300"]),
    ("E040", "layer M = mamba2(heads=«wid») let wide = 2 stack { M(heads=wide) }", ["did you mean `wide`?"]),
    ("E040", "layer F = mlp(act=«relu3») stack { F }", ["one of `silu`", "did you mean `relu"]),
    ("E040", "layer F = mlp(gated=«1») stack { F }", ["`true` or `false`, not `1`"]),
    ("E040", "layer A = attention(window=«non») stack { A }", ["or `none`", "did you mean `none`?"]),
    ("E040", "layer A = attention(rope=rope(theta=«0»)) stack { A }", ["`theta` must be", "not 0"]),
    (
        "E040",
        "layer A = attention(rope=rope(«thet»=2)) stack { A }",
        ["`rope` has no field `thet`", "`theta`"],
    ),
    (
        "E040",
        "layer A = attention(rope=«rop(theta=2)») stack { A }",
        ["must be one of `none`, `rope`", "did you mean `rope`?"],
    ),
    ("E040", "layer M = mamba2(dt_limit=«[1]») stack { M }", ["must have 2 values, not 1"]),
    ("E040", "layer M = mamba2(heads=«M») stack { M }", ["the layer `M` is not a value"]),
    ("E040", 'layer M = mamba2(heads=«"8"») stack { M }', ['not `"8"`']),
    ("E040", "model m { d_model = «0.5» } stack { M }", ["must be a whole number; 1/2 is not"]),
    ("E040", "layer F = mlp(dropout=«1e-20 - 1») stack { F }", ["at least 0"]),
    ("E040", "layer F = mlp(dropout=«1e308») stack { F }", ["at most 0.99, not 1e308"]),
    ("E040", "model m { init_std = «99999999999999999999e300» } stack { M }", ["at most 1.8e308"]),
    ("E041", "let a = «1e-300 - 1» stack { M }", ["more than 30 digits"]),
    ("E041", "let a = 1 / «0» stack { M }", ["division by zero", "this is 0"]),
    ("E041", "let a = 3 // «(2 - 2)» stack { M }", ["division by zero"]),
    ("E041", "let a = 1 + «b» stack { M }", ["`b` is not a number", "no such constant"]),
    ("E041", "let wide = 3 let a = 1 + «wid» stack { M }", ["did you mean `wide`?"]),
    ("E041", "let a = 1 + «true» stack { M }", ["arithmetic needs numbers, not `true`"]),
    ("E041", "let a = [1] let b = min(«a», 1) stack { M }", ["arithmetic needs numbers, not `[1]`"]),
    ("E041", "let a = «1e20 * 1e20» stack { M }", ["too large a number", "1e30"]),
    ("E041", "let a = «round_up(1)» stack { M }", ["takes 2 values, not 1"]),
    ("E041", "let a = «min()» stack { M }", ["at least one value, not 0"]),
    ("E041", "let a = round_up(1, «0») stack { M }", ["greater than 0"]),
    ("E042", "layer M = mamba2(heads=1, «heads»=2) stack { M }", ["given twice", "first here"]),
    ("E042", "model m { vocab = 1 «vocab» = 2 } stack { M }", ["given twice"]),
    ("E042", "layer A = attention(rope=rope(theta=1, «theta»=2)) stack { A }", ["given twice"]),
    ("E043", "layer M = mamba2(«8») stack { M }", ["arguments of `mamba2` have names", "=8"]),
    ("E043", "layer A = attention(rope=rope(«1e6»)) stack { A }", ["arguments of `rope` have names"]),
    ("E043", "let a = min(1, «x»=2) stack { M }", ["`min` takes plain values"]),
    # patterns
    ("E044", "layer B = [M F] stack { «B(heads=2)» }", ["`B` is a block", "change the layer inside"]),
    ("E045", "layer B = [M F] stack { «B»+A }", ["joins single layers", "this is a block"]),
    ("E045", "shared S = A stack { M+«S» }", ["this is a shared layer", "share the sum instead"]),
    (
        "E045",
        "layer N = M(norm=layernorm) stack { N+A(norm=«rmsnorm») }",
        ["the branches of a sum share one `norm`", "and here another"],
    ),
    ("E046", "shared S = A stack { S(«heads»=4) }", ["`S` is shared", "only `adapter` may"]),
    ("E046", "shared T = A shared S = [M «T»] stack { S }", ["and so is `T` in it"]),
    ("E047", "stack { M*«0» }", ["a repeat is at least 1", "0 times"]),
    ("E047", "stack { [«[M*9999]*9999»]*9999 }", ["99,980,001 layers", "at most 10,000"]),
    ("E049", "shared S = [M «|» A] stack { S }", ["used whole"]),
    ("E049", "stack { M } mtp { [M «|» A]*2 }", ["`mtp` tail is in the last stage"]),
    ("E049", "stack { M «[|]» }", ["no layers, only cuts"]),
]
LATER = [
    ("E029", "stack { «|» }", ["the stack has no layers"]),
    ("E047", "layer B = M*9999 stack { M «B» M }", ["10,001 layers"]),
    ("E047", "stack { M } «mtp(depths=16) { M*9999 }»", ["159,984 layers"]),
    ("E049", "stack { M | «|» M }", ["two cuts in a row"]),
    ("E049", "stack { [M «|»]*2 | }".replace("«|»", "|").replace("*2 |", "*2 «|»"), ["two cuts in a row"]),
]


def problems(marked: str, *, name: str = "m.mdl", whole: bool = False):
    """(diagnostics, marked place)"""
    start, end = marked.index("«"), marked.index("»") - 1
    file = read(from_text(marked.replace("«", "").replace("»", ""), name=name))
    with pytest.raises(MdlError) as caught:
        spec = resolve(file)
        if whole:
            unroll(spec)
    return caught.value.diagnostics, (start, end)


def one(code: str, marked: str, words: list[str], *, whole: bool = False) -> None:
    """Exactly one problem, at exactly that place, saying that."""
    found, place = problems(marked, whole=whole)
    shown = "\n".join(map(to_text, found))
    assert [d.code.id for d in found] == [code], shown
    assert (found[0].span.start, found[0].span.end) == place, shown
    for word in words:
        assert word in shown, shown


@pytest.mark.parametrize("code, marked, words", PROBLEMS)
def test_names_and_values(code, marked, words):
    one(code, marked, words)


@pytest.mark.parametrize("code, marked, words", LATER)
def test_what_is_found_when_layers_are_laid_out(code, marked, words):
    one(code, marked, words, whole=True)


def test_every_code_of_names_and_values_is_here():
    declared = {id for id in CODES if "E020" <= id <= "E049"}
    here = {code for code, *_ in PROBLEMS + LATER}
    # What needs folders is in test_imports, what comes from outside in test_overrides.
    assert declared - here == {"E032", "E033", "E048"}


def test_no_stack_has_no_place():
    with pytest.raises(MdlError) as caught:
        unroll(resolve(read(from_text("layer M = mamba2()"))))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code.id == "E029" and diagnostic.span is None and diagnostic.help


SEVERAL = """
model m { d_modle = 64  vocab = 0 }
let a = 1 / 0
let b = a + 1
layer W = A(windw=4)
layer B = [W W Q]
layer C = B
stack { W B C W(window=2) M*0 }
parts p { mamba2.nope = x }
mtp(depths=none) { Q }
"""


def test_all_problems_of_a_file_at_once_and_each_once():
    with pytest.raises(MdlError) as caught:
        resolve(read(from_text(SEVERAL)))
    found = [(d.code.id, d.span.text) for d in caught.value.diagnostics]
    assert sorted(found) == sorted(
        [
            ("E023", "d_modle"),
            ("E040", "0"),
            ("E041", "0"),
            ("E022", "windw"),
            ("E020", "Q"),
            ("E047", "0"),
            ("E028", "mamba2.nope"),
            ("E040", "none"),
            ("E020", "Q"),
        ]
    )


def test_a_broken_thing_is_not_reported_again_where_it_is_used():
    text = (
        "let a = 1 / 0 let b = a layer M = mamba2(heads=b) layer N = M layer O = [N N] stack { O M N a(x=1) }"
    )
    with pytest.raises(MdlError) as caught:
        resolve(read(from_text(text)))
    assert [d.code.id for d in caught.value.diagnostics] == ["E041", "E021"]


def test_two_errors_with_one_place_are_both_told():
    """As in Python, where a whole line is the place."""
    from mambadsl.graph.builder import Graph

    g = Graph()
    g.stack(g.layer("M", "mamba2", headz=1, groopz=2, heads=0))
    with pytest.raises(MdlError) as caught:
        resolve(g.file())
    assert [d.code.id for d in caught.value.diagnostics] == ["E022", "E022", "E040"]


def test_the_number_of_problems_is_bounded():
    with pytest.raises(MdlError) as caught:
        resolve(read(from_text("stack { " + " ".join(f"Q{i}" for i in range(1000)) + " }")))
    assert len(caught.value.diagnostics) == 50


def test_places_of_outside_values_stay_in_their_option():
    file = override(read(from_text("layer M = mamba2() stack { M }")), {"M.heads": "0"})
    with pytest.raises(MdlError) as caught:
        resolve(file)
    (diagnostic,) = caught.value.diagnostics
    assert str(diagnostic.span) == "--set M.heads:1:15" and diagnostic.span.text == "0"


def test_short_counts():
    assert codes.short_count(10_001) == "10,001"
    assert codes.short_count(10**13) == "about 1e+13"
    assert codes.short_count(10**400) == "more than 1e300"
