"""Models built in Python: the same graph as from text, and errors at the Python line."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mambadsl
from mambadsl import Graph, MdlError, form, load
from mambadsl.graph.graph import LayerGraph


def same(g: Graph, text: str) -> None:
    built, read = g.compile().layers, load(text=text).layers
    assert built.content() == read.content()
    assert load(text=g.compile().write()).layers == built


def test_layers_sums_groups_repeats_cuts_and_copies():
    g = Graph("toy", vocab=256, d_model=64, norm=form("layernorm", bias=False), tie_embeddings=True)
    M = g.layer("M", "mamba2", head_dim=16)
    A = g.layer("A", "attention", heads=4, rope=form("rope", theta=1e6))
    g.stack([M, A] * 2, M + A, g.cut, A(window=8), 3 * M, [M, [A] * 2], (M + A) * 2, M * 2 * 2)
    same(
        g,
        """
        model toy { vocab = 256 d_model = 64 norm = layernorm(bias=false) tie_embeddings = true }
        layer M = mamba2(head_dim=16)
        layer A = attention(heads=4, rope=rope(theta=1e6))
        stack { [M A M A] M+A | A(window=8) M*3 [M [A A]] [M+A]*2 [M*2]*2 }
    """,
    )


def test_blocks_shared_items_tails_and_facts():
    g = Graph("zamba", d_model=64)
    M = g.layer("M", "mamba2")
    F = g.layer("F", "mlp", act="relu2")
    B = g.layer("B", [M, F])
    H = g.layer("H", M + F)
    S = g.shared("S", "attention", heads=4, input="with_embedding")
    T = g.shared("T", [M * 2, F])
    g.stack(B, S, B * 2, S(adapter=form("lora", rank=4)), T, H(recompute=True), T)
    g.mtp(M, [F], depths=2, weights="shared")
    g.expect("layers", "==", 2 + 1 + 4 + 1 + 3 + 1 + 3)
    same(
        g,
        """
        model zamba { d_model = 64 }
        layer M = mamba2()
        layer F = mlp(act=relu2)
        layer B = [M F]
        layer H = M + F
        shared S = attention(heads=4, input=with_embedding)
        shared T = [M*2 F]
        stack { B S B*2 S(adapter=lora(rank=4)) T H(recompute=true) T }
        mtp(depths=2, weights=shared) { M [F] }
    """,
    )


def test_every_sort_of_value():
    g = Graph(d_model=64)
    M = g.layer("M", "mamba2", dt_limit=(0.001, "inf"), a_range=[0.5, 8], bias=True, norm_eps=1e-6)
    A = g.layer(
        "A",
        "attention",
        heads=4,
        window=None,
        softcap=30,
        rope=form("rope", scaling=form("linear", factor=2)),
    )
    g.stack(M, A)
    same(
        g,
        """
        model a_model { d_model = 64 }
        layer M = mamba2(dt_limit=[0.001, inf], a_range=[0.5, 8], bias=true, norm_eps=1e-6)
        layer A = attention(heads=4, softcap=30, rope=rope(scaling=linear(factor=2)))
        stack { M A }
    """,
    )


def lines(error: MdlError) -> list[tuple[str, int]]:
    return [(d.code.id, d.span.line) for d in error.diagnostics]


def test_errors_point_at_the_python_line(tmp_path):
    script = tmp_path / "build_it.py"
    script.write_text("""\
import mambadsl
g = mambadsl.Graph("toy", d_modle=64)
M = g.layer("M", "mamba2",
            headz=3)
A = g.layer("A", "attention", heads=0)
B = g.layer("B", [M])
for item in (B,):
    g.stack(item,
            A(window=-1),
            M * 0)
g.expect("layrs", "==", 3)
try:
    g.compile()
except mambadsl.MdlError as error:
    for d in error.diagnostics:
        print(d.code.id, d.span.source.name == __file__, d.span.line, d.span.text)
""")
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert sorted(out.splitlines()) == sorted(
        [
            'E023 True 2 g = mambadsl.Graph("toy", d_modle=64)',
            'E022 True 3 M = g.layer("M", "mamba2",',
            'E040 True 5 A = g.layer("A", "attention", heads=0)',
            "E047 True 10 M * 0)",
        ]
    )


def test_a_line_of_the_checker_too():
    g = Graph("toy", d_model=64)
    g.stack(g.layer("A", "attention", heads=3, kv_heads=2, head_dim=8, rope=form("rope")))
    with pytest.raises(MdlError) as caught:
        g.compile()
    (found,) = [d for d in caught.value.diagnostics if d.severity == "error"]
    assert found.code.id == "E204" and "g.stack(g.layer(" in found.span.text


@pytest.mark.parametrize("name", ["m", "M-1", "", "Größe", "M\nstack { M }", "1M"])
def test_names_of_layers(name):
    with pytest.raises(MdlError) as caught:
        Graph("toy").layer(name, "mamba2")
    assert lines(caught.value)[0][0] == "E061"


@pytest.mark.parametrize("name", ["Toy", "model", "a b", "", "7b"])
def test_names_of_models(name):
    with pytest.raises(MdlError, match="E061"):
        Graph(name)


def test_misuse_is_a_plain_python_error():
    g = Graph("toy")
    M = g.layer("M", "mamba2")
    for wrong in (
        lambda: M + 3,
        lambda: M * 1.5,
        lambda: M * True,
        lambda: g.cut * 2,
        lambda: M + g.cut,
        lambda: g.cut + M,
        lambda: (M + M)(heads=2),
        lambda: g.stack("M"),
        lambda: g.stack(3),
        lambda: g.layer("N", "mlp", act=object()),
        lambda: g.layer("N", [M], heads=3),
        lambda: (M * 2) + M,
    ):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (lambda: g.expect("layers", "=", 3), lambda: g.layer("N", "mlp", dropout=float("nan"))):
        with pytest.raises(ValueError):
            wrong()


def test_wrong_words_are_problems_of_the_model():
    g = Graph("toy")
    g.stack(g.layer("F", "mlp", act="no such\nthing"))
    with pytest.raises(MdlError, match="E040"):
        g.compile()


def test_where_there_is_no_source_there_is_still_a_place():
    names = {"mambadsl": mambadsl}
    exec("g = mambadsl.Graph('toy', vocab=0)\ng.stack(g.layer('M', 'mamba2'))", names)
    with pytest.raises(MdlError) as caught:
        names["g"].compile()
    assert "E040" in str(caught.value) and "<string>" in str(caught.value)


def test_a_graph_may_be_compiled_again_after_more_was_added():
    g = Graph("toy", d_model=64)
    F = g.layer("F", "mlp")
    g.stack(F)
    assert isinstance(g.compile().layers, LayerGraph)
    g.mtp(F)
    assert g.compile().layers.mtp is not None


def test_a_layer_of_another_graph_is_refused():
    """It would silently mean whatever its name means here."""
    one, other = Graph("one"), Graph("other")
    M = one.layer("M", "mamba2", head_dim=16)
    mine = other.layer("A", "attention")
    stacked = (lambda: other.stack(M)), (lambda: other.stack([mine, [M]]))
    for use in (*stacked, lambda: mine + M, lambda: other.layer("B", M)):
        with pytest.raises(ValueError, match="another Graph"):
            use()


def test_what_is_no_pattern_is_said_at_once():
    g = Graph("toy")
    M = g.layer("M", "mamba2", dt_limit=(0, float("inf")))
    loop = [M]
    loop.append(loop)
    with pytest.raises(ValueError, match="more than 64 deep"):
        g.stack(loop)
    with pytest.raises(ValueError, match="an empty list"):
        g.stack([])
    with pytest.raises(ValueError, match="nan"):
        g.layer("N", "mamba2", heads=float("nan"))
    with pytest.raises(TypeError, match="a model's name is text"):
        Graph(1)
