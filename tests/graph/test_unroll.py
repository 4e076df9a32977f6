"""Laying out: paths, owners, trails, cuts, edges, what is carried past the stream, tails."""

from __future__ import annotations

import pytest

from mambadsl.graph.graph import Edge, LayerGraph, Role
from mambadsl.graph.unroll import unroll
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import from_text


def graph(text: str) -> LayerGraph:
    return unroll(resolve(read(from_text(text, name="m.mdl"))))


def labels(text: str) -> str:
    return " ".join(n.layer.label for n in graph(text).layers)


@pytest.mark.parametrize(
    "text, row",
    [
        ("M A F", "M A F"),
        ("M*3 A", "M M M A"),
        ("[M F]*2", "M F M F"),
        ("[M [A F]*2]*2", "M A F A F M A F A F"),
        ("[[M]*2]*2", "M M M M"),
        ("M+A F", "M+A F"),
        ("[M+A]*2", "M+A M+A"),
        ("layer B = [M F]*2 stack { B A B*2 }", "M F M F A M F M F M F M F"),
        ("layer B = [M F] layer C = [B A]*2 stack { C }", "M F A M F A"),
        ("shared S = [A F]*2 stack { S M }", "A F A F M"),
    ],
)
def test_rows(text, row):
    assert labels(text) == row


def test_paths_and_roles():
    g = graph("model m { vocab = 10 } stack { M | [A F]*2 } mtp(depths=2) { A F }")
    assert [n.path for n in g.nodes] == [
        "embed",
        "stack.0",
        "stack.1",
        "stack.2",
        "stack.3",
        "stack.4",
        "head",
        "mtp.0.in",
        "mtp.0.0",
        "mtp.0.1",
        "mtp.0.out",
        "mtp.1.in",
        "mtp.1.0",
        "mtp.1.1",
        "mtp.1.out",
    ]
    assert [n.role for n in g.nodes if n.role is not Role.LAYER] == [
        Role.EMBED,
        Role.HEAD,
        Role.MTP_IN,
        Role.MTP_OUT,
        Role.MTP_IN,
        Role.MTP_OUT,
    ]
    assert all(n.owner == n.path for n in g.nodes)
    assert [n.path for n in g.layers] == [f"stack.{i}" for i in range(5)]
    assert g.by_path["stack.3"].layer.label == "A"


def test_branches_have_paths_of_their_own():
    (node,) = graph("M + A").layers
    assert [(path, prefix) for path, prefix, _ in node.branches()] == [
        ("stack.0.0", "stack.0.0"),
        ("stack.0.1", "stack.0.1"),
    ]
    (single,) = graph("M").layers
    assert [(path, prefix) for path, prefix, _ in single.branches()] == [("stack.0", "stack.0.mixer")]


def test_owners():
    g = graph("""
        shared S = [A [M F]*2]
        shared T = mlp()
        stack { S T M S [T M]*2 }
        mtp(depths=2, weights=shared) { T A }
    """)
    five = [f"shared.S.{i}" for i in range(5)]
    assert [n.owner for n in g.layers] == [
        *five,
        "shared.T",
        "stack.6",
        *five,
        "shared.T",
        "stack.13",
        "shared.T",
        "stack.15",
    ]
    tail = [n.owner for n in g.nodes if n.path.startswith("mtp.")]
    assert tail == ["mtp.0.in", "shared.T", "mtp.0.1", "mtp.0.out"] * 2
    assert [n.shared for n in g.layers[5:8]] == [True, False, True]


def test_cuts():
    def cuts(text):
        g = graph(text)
        return [n.path for n in g.nodes if n.cut_after]

    assert cuts("M | A F | M") == ["stack.0", "stack.2"]
    assert cuts("| M A") == ["embed"]
    assert cuts("M A |") == ["stack.1"]
    assert cuts("[M A |]*3") == ["stack.1", "stack.3", "stack.5"]
    assert cuts("[| M]*2") == ["embed", "stack.0"]
    assert cuts("layer B = [M | A] stack { B B }") == ["stack.0", "stack.2"]
    assert cuts("M") == []
    g = graph("M | A")
    assert g.layers[0].cut_span.text == "|" and g.layers[1].cut_span is None


@pytest.mark.parametrize("text, guilty", [("M | | A", 4), ("| | M", 2), ("[M |]*2 |", 8), ("[| M |]*2", 1)])
def test_two_cuts_in_a_row(text, guilty):
    with pytest.raises(MdlError) as caught:
        graph(text)
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code.id, diagnostic.span.start) == ("E049", guilty)


def test_edges():
    g = graph("model m { d_model = 8 } stack { M A(input=with_embedding) F }")
    assert set(g.edges) == {
        Edge("embed", "stack.0", "x", 8),
        Edge("stack.0", "stack.1", "x", 8),
        Edge("embed", "stack.1", "x0", 8),
        Edge("stack.1", "stack.2", "x", 8),
        Edge("stack.2", "head", "x", 8),
    }


def test_the_first_layer_may_read_the_embedding_twice():
    g = graph("model m { d_model = 8 } stack { A(input=with_embedding) }")
    assert [e.tensor for e in g.edges if e.target == "stack.0"] == ["x", "x0"]


def test_edges_beside_the_stream():
    """Layers that are aside pass the stream on; the next layer reads what they give, and nobody after it."""
    g = graph("model m { d_model = 8 } layer T = A(residual=aside) stack { M T(input=with_embedding) T M F }")
    assert {(e.source, e.target, e.tensor) for e in g.edges if e.tensor != "x"} == {
        ("embed", "stack.1", "x0"), ("stack.1", "stack.2", "t"), ("stack.2", "stack.3", "t"),
    }
    assert [e.target for e in g.edges if e.tensor == "x"] == [*(f"stack.{i}" for i in range(5)), "head"]
    assert g.residual_additions == 3 and g.reads["stack.3"] == {"x", "t"}
    tail = graph("stack { M } mtp(depths=2) { A(residual=aside) F }")
    beside = [(e.source, e.target) for e in tail.edges if e.tensor == "t"]
    assert beside == [("mtp.0.0", "mtp.0.1"), ("mtp.1.0", "mtp.1.1")]


def test_edges_of_what_layers_give():
    """From the nearest layer above; to both branches of a sum, once; never into the tail."""
    g = graph(
        "model m { d_model = 8 } layer G = mamba1(d_inner=12, gives=scan) layer U = gmu(d_inner=12)"
        " stack { G U U+F G U } mtp { G U }"
    )
    assert [e for e in g.edges if e.tensor == "scan"] == [
        Edge("stack.0", "stack.1", "scan", 12), Edge("stack.0", "stack.2", "scan", 12),
        Edge("stack.3", "stack.4", "scan", 12), Edge("mtp.0.0", "mtp.0.1", "scan", 12),
    ]
    assert g.carried == {"scan"} and g.reads["stack.2"] == {"x", "scan"}


def test_edges_of_the_tail():
    g = graph("model m { d_model = 8 } stack { M } mtp(depths=2) { A(input=with_embedding) F }")
    tail = {(e.source, e.target, e.tensor) for e in g.edges if e.target.startswith("mtp.")}
    assert tail == {
        ("head", "mtp.0.in", "h"),
        ("embed", "mtp.0.in", "next"),
        ("mtp.0.in", "mtp.0.0", "x"),
        ("embed", "mtp.0.0", "x0"),
        ("mtp.0.0", "mtp.0.1", "x"),
        ("mtp.0.1", "mtp.0.out", "x"),
        ("mtp.0.out", "mtp.1.in", "h"),
        ("embed", "mtp.1.in", "next"),
        ("mtp.1.in", "mtp.1.0", "x"),
        ("embed", "mtp.1.0", "x0"),
        ("mtp.1.0", "mtp.1.1", "x"),
        ("mtp.1.1", "mtp.1.out", "x"),
    }
    assert [e for e in g.edges if e.target == "head"] == [Edge("stack.0", "head", "x", 8)]


def test_order_is_one_that_runs():
    g = graph("stack { M | A(input=with_embedding) } mtp(depths=3) { A F }")
    place = {n.path: i for i, n in enumerate(g.nodes)}
    assert all(place[e.source] < place[e.target] for e in g.edges)


def test_trails():
    g = graph("layer B = [M F]*2 stack { [B A]*2 }")
    node = g.layers[8]
    assert [(f.label, f.index, f.count) for f in node.trail] == [("B*2 A", 1, 2), ("B", 1, 2)]
    assert node.trail[0].span.text == "[B A]*2" and node.trail[1].span.text == "B"
    assert graph("M [F A]").layers[1].trail == ()


def test_equality_is_content():
    assert graph("M M M") == graph("stack {\n M*3 }".replace("stack", "# c\nstack"))
    assert hash(graph("M M M")) == hash(graph("[M]*3"))
    assert graph("M M M") != graph("M M")
    assert graph("M | M") != graph("M M")
    assert graph("shared S = M stack { S S }") != graph("M M")
    assert graph("stack { M } mtp { M }") != graph("stack { M } mtp { A }")
    assert graph("stack { M } parts p {}") != graph("M")
    assert graph("model a { d_model = 64 } stack { M }") != graph("model b { d_model = 64 } stack { M }")
    assert graph("M") != "M"
