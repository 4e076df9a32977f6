"""What a file means: scopes, exact values, changed layers, sums, shared items, tails, parts, and where all of
it was written."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.unroll import unroll
from mambadsl.graph.weights import node_weights
from mambadsl.kinds.fields import Call, Word
from mambadsl.spec.model import ModelSpec, is_name, name_of
from mambadsl.spec.resolve import resolve
from mambadsl.spec.values import evaluate
from mambadsl.syntax.read import read
from mambadsl.text.source import from_text


def spec(text: str, *, name: str = "m.mdl") -> ModelSpec:
    return resolve(read(from_text(text, name=name)))


def graph(text: str) -> LayerGraph:
    return unroll(spec(text))


def fields(text: str, *, layer: int = 0, branch: int = 0):
    return graph(text).layers[layer].layer.branches[branch].fields


class Names:
    """A scope for `evaluate`: some constants."""

    def __init__(self, **values):
        self.values = values

    def lookup(self, name):
        return self.values.get(name.text)

    def names(self):
        return list(self.values)


def value(text: str, **names):
    return evaluate(read(from_text(f"let x = {text}")).statements[0].value, Names(**names))


# ---- values


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("4096 / 24", Fraction(512, 3)),
        ("4096 // 24", 170),
        ("-7 // 2", -4),
        ("7 / 2 * 2", 7),
        ("1e-5 * 1e5", 1),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("2 - 3 - 4", -5),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("--3", 3),
        ("round_up(170, 64)", 192),
        ("round_up(192, 64)", 192),
        ("round_up(8 * 100 / 3, 64)", 320),
        ("round_up(-1, 64)", 0),
        ("round_up(1 / 3, 1 / 4)", Fraction(1, 2)),
        ("min(3, 1, 2)", 1),
        ("max(3)", 3),
        ("max(1, 2 * 3 // 4)", 1),
        ("131_072", 131072),
        ("1e3", 1000),
    ],
)
def test_numbers_are_exact(text, wanted):
    assert value(text) == wanted and isinstance(value(text), Fraction)


def test_other_values():
    assert value("relu2") == Word("relu2")
    assert value("f(a=1, b=[true, none])") == Call("f", {"a": Fraction(1), "b": [True, Word("none")]})
    assert value('"a b"') == "a b"
    assert value("a", a=Word("silu")) == Word("silu")


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_arithmetic_is_that_of_the_integers(a, b, c):
    assert value("a + b * c - a // c", a=Fraction(a), b=Fraction(b), c=Fraction(c)) == a + b * c - a // c
    assert value("a / c * c", a=Fraction(a), c=Fraction(c)) == a
    rounded = value("round_up(a, c)", a=Fraction(a), c=Fraction(c))
    assert rounded % c == 0 and 0 <= rounded - a < c


# ---- names


def test_constants_in_any_order_and_over_settings():
    assert (
        fields(
            "layer F = mlp(d_ff=b) let b = 2 * a let a = d_model model m { d_model = 96 } stack { F }"
        ).d_ff
        == 192
    )


def test_settings_may_use_constants_and_each_other():
    model = spec("let k = 2 model m { d_model = 64 * k context = 4 * d_model } stack { M }").settings
    assert (model.d_model, model.context) == (128, 512)


def test_defaults_of_settings_have_names_too():
    assert fields("stack { mlp(d_ff=2 * d_model) }").d_ff == 2048


def test_a_setting_that_does_not_fit_counts_as_its_default_elsewhere():
    with pytest.raises(Exception) as caught:
        spec("model m { d_model = 1 / 2 } layer F = mlp(d_ff=2 * d_model) stack { F }")
    assert [d.span.text for d in caught.value.diagnostics] == ["1 / 2"]


def test_the_prelude_may_be_declared_anew():
    assert [n.layer.branches[0].kind for n in graph("layer A = mlp() stack { A S F }").layers] == [
        "mlp",
        "attention",
        "mlp",
    ]


@pytest.mark.parametrize(
    "file, name",
    [
        ("Tiny-2.mdl", "tiny_2"),
        ("nemotron_h_8b.mdl", "nemotron_h_8b"),
        ("<text>", "text"),
        ("7b.mdl", "model_7b"),
        ("model.mdl", "model_model"),
        ("stack.mdl", "model_stack"),
        ("\u00df.mdl", "a_model"),
        ("a/b c.d.mdl", "b_c_d"),
        ("--x--.mdl", "x"),
        ("", "a_model"),
    ],
)
def test_a_models_name_from_its_files(file, name):
    assert name_of(file) == name and is_name(name)
    assert spec("M", name=file).name == name


# ---- layers


def test_fields_are_given_in_the_legend_the_map_and_by_constants():
    text = "let w = 16 layer A = attention(window=w) layer W = A(window=4) stack { A W W(window=2) A(window=none) }"
    assert [fields(text, layer=i).window for i in range(4)] == [16, 4, 2, None]


def test_a_changed_copy_is_filled_anew():
    """What followed from another field follows again: kv_heads from heads."""
    text = "layer A = attention(heads=8, head_dim=8) stack { A A(heads=4) A(heads=4, kv_heads=1) }"
    assert [fields(text, layer=i).kv_heads for i in range(3)] == [8, 4, 1]


def test_fields_of_the_sublayer_go_with_the_kind():
    layers = graph(
        "model m { norm = layernorm } stack { M(norm=none) M M(residual=post, dropout=0.1) }"
    ).layers
    assert [n.layer.sub.norm.name for n in layers] == ["none", "layernorm", "layernorm"]
    assert layers[2].layer.sub.residual.name == "post"
    assert layers[2].layer.branches[0].branch.dropout == 0.1


def test_sums():
    text = "layer N = M(norm=layernorm) layer H = N + A(out_multiplier=2) layer K = H + F stack { K H(recompute=true) }"
    first, second = graph(text).layers
    assert [b.kind for b in first.layer.branches] == ["mamba2", "attention", "mlp"]
    assert [b.name for b in first.layer.branches] == ["N", "A", "F"]
    assert first.layer.sub.norm.name == "layernorm" and first.layer.label == "K"
    assert [b.branch.out_multiplier for b in first.layer.branches] == [1, 2, 1]
    assert second.layer.sub.recompute and len(second.layer.branches) == 2


def test_sums_agree_in_what_they_share_however_it_is_written():
    text = "stack { M(norm=rmsnorm)+A(norm=rmsnorm())+F(norm=rmsnorm(eps=1e-5)) }"
    assert graph(text).layers[0].layer.sub.norm.eps == 1e-5


def test_shared_items_and_their_adapters():
    text = "shared S = [A(adapter=lora(rank=2)) F] stack { S S(adapter=lora(rank=4)) S(adapter=none) M }"
    g = graph(text)
    assert [n.owner for n in g.layers] == [*["shared.S.0", "shared.S.1"] * 3, "stack.6"]
    ranks = [getattr(n.layer.branches[0].branch.adapter.values, "_items").get("rank") for n in g.layers]
    assert ranks == [2, None, 4, 4, None, None, None]
    names = [[path for path, _ in node_weights(g, node)] for node in g.layers]
    assert "stack.2.mixer.adapter.qkv_proj.up.weight" in names[2]
    assert "shared.S.0.mixer.qkv_proj.weight" in names[0] and "shared.S.0.mixer.qkv_proj.weight" in names[2]


def test_a_shared_item_of_one_layer_has_a_short_owner():
    assert [n.owner for n in graph("shared S = M + A stack { S F S*2 }").layers] == [
        "shared.S",
        "stack.1",
        "shared.S",
        "shared.S",
    ]


def test_repeats_of_one_are_nothing():
    assert spec("stack { M*1 [M F]*1 }").stack == spec("stack { M [M F] }").stack


def test_the_tail():
    s = spec("stack { M } mtp(depths=1 + 1, weights=shared) { A F }")
    assert s.mtp.settings.depths == 2 and s.mtp.settings.weights == "shared"
    assert spec("stack { M } mtp { A }").mtp.settings.depths == 1


def test_parts():
    (mine, other) = spec("""
        let n = 1 / 3
        layer W = A
        stack { W }
        parts mine : other { attention.core = flash.attend(block=2 * n, on=[true, fast]) W.o_proj = plain }
        parts other { mamba2.scan = triton.ssd() }
    """).parts
    assert (mine.name, mine.base, other.base) == ("mine", "other", None)
    assert [(c.path, c.part) for c in mine.choices] == [
        ("attention.core", "flash.attend"),
        ("W.o_proj", "plain"),
    ]
    assert mine.choices[0].args == (("block", Fraction(2, 3)), ("on", (True, Word("fast"))))
    assert hash(mine) == hash(mine)


def test_a_library_is_checked_and_has_no_stack():
    s = spec("layer W = A(window=4) let x = 3")
    assert s.stack == () and s.mtp is None


# ---- where it was written


def test_the_chain_of_places(tmp_path):
    """Use, block, definition, import: what a note `used 6 times: Local (line 4) in stack lines 7-8` is made of."""
    (tmp_path / "lib.mdl").write_text("layer A = attention()\nlayer W = A(window=4)\nlayer Pair = [W W]\n")
    main = tmp_path / "main.mdl"
    main.write_text("""
from "lib.mdl" import W, Pair

layer Local = [W(window=8) Pair]*2
stack {
  M
  Local
  Local
}
""")
    from mambadsl.text.source import read as read_source

    g = unroll(resolve(read(read_source(main, name="main.mdl"))))
    assert [n.layer.label for n in g.layers] == ["M", *["W"] * 12]
    changed, paired, last = g.layers[1], g.layers[2], g.layers[12]

    def places(spans):
        return [(span.source.name, span.line) for span in spans]

    assert changed.span.text == "W(window=8)" and places([changed.span]) == [("main.mdl", 4)]
    assert [(f.label, f.index, f.count) for f in changed.trail] == [("Local", 0, 2)]
    assert places([changed.trail[0].span]) == [("main.mdl", 7)]
    assert places(changed.trail[0].chain) == [("main.mdl", 4)]
    chain = changed.layer.branches[0].chain
    assert [span.text for span in chain] == ["attention()", "A", "A(window=4)", "W", "W", "W(window=8)"]
    assert places(chain) == [*[("lib.mdl", line) for line in (1, 1, 2, 2)], ("main.mdl", 2), ("main.mdl", 4)]
    assert [(f.label, f.index) for f in paired.trail] == [("Local", 0), ("Pair", 0)]
    assert places(paired.trail[1].chain) == [("lib.mdl", 3), ("main.mdl", 2)]
    assert places([paired.trail[1].span, paired.span]) == [("main.mdl", 4), ("lib.mdl", 3)]
    assert places([f.span for f in last.trail]) == [("main.mdl", 8), ("main.mdl", 4)]
    assert [f.index for f in last.trail] == [1, 0]


def test_branches_of_a_sum_have_their_own_places():
    text = "layer M = mamba2()\nlayer A = attention(heads=4)\nlayer H = M + A\nstack { H }"
    mamba, attention = graph(text).layers[0].layer.branches
    assert (mamba.span.line, attention.span.line) == (1, 2)
    assert [s.text for s in attention.chain] == ["attention(heads=4)", "A", "M + A", "H"]
    assert attention.origins["heads"].span.text == "heads=4"


def test_origins():
    s = graph("let w = 4 layer A = attention(heads=8) stack { A(window=w) }").layers[0].layer.branches[0]
    assert {k: (o.how, o.span and o.span.text) for k, o in s.origins.items() if o.how != "default"} == {
        "heads": ("given", "heads=8"),
        "window": ("given", "window=w"),
    }
