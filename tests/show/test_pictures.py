"""Pictures: the same for the same model, true to the graph, and well-formed in their languages."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from show_models import program

from mambadsl import load
from mambadsl.show.colors import of_stage
from mambadsl.show.dot import dot_text
from mambadsl.show.explorer import explorer_data, explorer_text
from mambadsl.show.flow import flow, stages_of
from mambadsl.show.mermaid import mermaid_text
from mambadsl.show.svg import svg_text
from mambadsl.show.tree import tree_text

FORMS = {"tree.txt": tree_text, "dot": dot_text, "mmd": mermaid_text, "svg": svg_text, "explorer.json": explorer_text}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "name, form",
    [
        *((name, form) for name in ("falcon_h1_0_5b", "tiny", "shared") for form in FORMS if form != "explorer.json"),
        ("tiny", "explorer.json"),
    ],
)
def test_golden(name, form, golden):
    graph = program(name).layers
    picture = FORMS[form](graph)
    golden(f"show/{name}.{form}", picture)
    assert FORMS[form](program(name).layers) == picture


@pytest.mark.parametrize("form", ["tree.txt", "svg"])
def test_golden_with_a_plan(form, golden):
    """Cuts by hand, so that this is about the picture and not about the planner."""
    graph = program("nemotron_h_8b").layers
    paths, cuts = [node.path for node in graph.nodes], (0, 14, 28, 41, 54)
    stages = [SimpleNamespace(index=i, paths=paths[a:b]) for i, (a, b) in enumerate(pairwise(cuts))]
    golden(f"show/nemotron_h_8b_4_stages.{form}", FORMS[form](graph, plan=SimpleNamespace(stages=stages)))


def test_links_are_the_graph_s_edges():
    graph = program("shared").layers
    picture = flow(graph)
    box_of = {node.path: box.label for box in picture.boxes for node in box.nodes}
    drawn = {(picture.boxes[k.source].label, picture.boxes[k.target].label, k.sort) for k in picture.links}
    assert ("embed", "T", "x0") in drawn and ("embed", "in", "next") in drawn
    assert {(a, b) for a, b, sort in drawn if sort == "shared"} == {("A", "A"), ("T", "T")}
    tensors = {(box_of[e.source], box_of[e.target], e.tensor) for e in graph.edges}
    assert {d for d in drawn if d[2] not in ("shared", "tied")} <= tensors
    assert not any(sort == "tied" for *_, sort in drawn)
    tied = [k for k in flow(program("tiny").layers).links if k.sort == "tied"]
    assert [(k.source, k.target) for k in tied] == [(0, len(flow(program("tiny").layers).boxes) - 1)]


def test_what_is_given_aside_is_drawn():
    picture = flow(program("zamba2_1_2b").layers)
    drawn = {(picture.boxes[k.source].label, picture.boxes[k.target].label, k.sort) for k in picture.links}
    assert {d for d in drawn if d[2] == "t"} == {("A", "F", "t"), ("F", "P", "t"), ("P", "M", "t")}
    assert "residual=aside" in tree_text(program("zamba2_1_2b").layers)


def test_what_layers_give_is_drawn():
    """From the middle of the model to the folded upper half, one line each."""
    graph = program("phi_4_mini_flash").layers
    picture = flow(graph)
    links = [k for k in picture.links if k.carried]
    assert [(picture.boxes[k.source].label, picture.boxes[k.target].label, k.sort) for k in links] == [
        ("M", "U", "scan"), ("A", "A", "kv"),
    ]
    for form in dot_text, mermaid_text:
        assert "scan" in form(graph) and "kv" in form(graph)
    assert "gives=kv" in tree_text(graph) and "takes=kv" in tree_text(graph)


def test_every_box_can_be_reached():
    """Following links from the embedding gets to every box, in each shipped shape of model."""
    for name in ("nemotron_h_8b", "falcon_h1_0_5b", "tiny", "shared"):
        picture = flow(program(name).layers)
        reached = {0}
        for link in sorted(picture.links, key=lambda k: k.source):
            if link.source in reached and not link.weights:
                reached.add(link.target)
        assert reached == set(range(len(picture.boxes)))


def test_stages_come_from_the_plan_or_from_the_marks():
    made = program("nemotron_h_8b")
    plan = made.plan(stages=4)
    found = stages_of(made.layers, plan=plan)
    assert all(found[path] == plan.stage_of(path) for path in made.layers.by_path)
    assert stages_of(made.layers) is None
    marked = stages_of(load(text="stack { | M M | A }").layers)
    assert marked == {"embed": 0, "stack.0": 1, "stack.1": 1, "stack.2": 2, "head": 2}
    text = svg_text(made.layers, plan=plan)
    assert all(of_stage(stage) in text for stage in range(4))


@pytest.mark.parametrize("name", ["falcon_h1_0_5b", "tiny", "shared"])
def test_svg_is_xml_and_nothing_leaves_the_page(name):
    root = ElementTree.fromstring(svg_text(program(name).layers))
    wide, high = float(root.get("width")), float(root.get("height"))
    boxes = [e for e in root.iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]
    assert len(boxes) == len(flow(program(name).layers).boxes)
    places = [[float(e.get(k)) for k in ("x", "y", "width", "height")] for e in root.iter(f"{SVG}rect")]
    assert all(x >= 0 and y >= 0 and x + w <= wide and y + h <= high for x, y, w, h in places)
    ys = [float(e.get("y")) for e in boxes]
    assert ys == sorted(ys)
    for line in root.iter(f"{SVG}path"):
        numbers = [float(n) for n in re.findall(r"-?[0-9.]+", line.get("d"))]
        assert all(0 <= x <= wide for x in numbers[::2])


def test_svg_escapes_what_the_text_says():
    """The only words of a model that reach the picture are names; these have no marks of XML, titles may."""
    from mambadsl.show.marks import rect, text

    assert "<b>" not in text(0, 0, "<b>&") and "&lt;b&gt;&amp;" in text(0, 0, "<b>&")
    assert "<title>a &lt; b</title>" in rect(0, 0, 1, 1, fill="red", title="a < b")


@pytest.mark.parametrize("name", ["falcon_h1_0_5b", "tiny", "shared"])
def test_dot_and_mermaid_name_what_they_link(name):
    graph = program(name).layers
    dot, mermaid = dot_text(graph), mermaid_text(graph)
    assert dot.count("{") == dot.count("}")
    assert mermaid.count("subgraph") == len(re.findall(r"^\s*end$", mermaid, re.MULTILINE)) == dot.count("subgraph")
    for text, arrow in ((dot, r"^\s*(n\d+) -> (n\d+)"), (mermaid, r"^\s*(n\d+) -.*?(n\d+)$")):
        declared = set(re.findall(r"^\s*(n\d+)\s?\[", text, re.MULTILINE))
        linked = re.findall(arrow, text, re.MULTILINE)
        assert len(linked) == len(flow(graph).links)
        assert {end for link in linked for end in link} == declared


@pytest.mark.parametrize("name", ["falcon_h1_0_5b", "tiny", "shared"])
def test_explorer_has_every_node_and_edge(name):
    graph = program(name).layers
    (only,) = explorer_data(graph)["graphs"]
    nodes = {node["id"]: node for node in only["nodes"]}
    assert len(nodes) == len(only["nodes"])
    assert set(graph.by_path) <= set(nodes)
    incoming = {(e["sourceNodeId"], id) for id, node in nodes.items() for e in node["incomingEdges"]}
    assert {source for source, _ in incoming} <= set(nodes)
    for edge in graph.edges:
        inner = [id for id in nodes if id == edge.target or id.startswith(f"{edge.target}.")]
        assert any((edge.source, id) in incoming for id in inner)
    for node in only["nodes"]:
        assert all(isinstance(a["value"], str) and a["value"] for a in node["attrs"])


def test_explorer_numbers_blocks_among_their_like():
    nodes = explorer_data(program("shared").layers)["graphs"][0]["nodes"]
    spaces = {node["id"]: (node["namespace"], node["label"]) for node in nodes}
    assert spaces["stack.0"] == ("stack", "M")
    assert spaces["stack.9"] == ("stack/Local[0]/[M F][0]", "M")
    assert spaces["stack.29"] == ("stack/Local[2]", "A")
    assert spaces["stack.7"] == ("stack", "T")
    assert spaces["mtp.1.0"] == ("mtp[1]", "A")


def test_explorer_keeps_sums_apart():
    nodes = explorer_data(load(text="M+A M+A").layers)["graphs"][0]["nodes"]
    spaces = {node["id"]: node["namespace"] for node in nodes}
    assert [spaces[f"stack.{i}.{j}"] for i in (0, 1) for j in (0, 1)] == ["stack/M+A[0]"] * 2 + ["stack/M+A[1]"] * 2


def test_explorer_is_json():
    assert json.loads(explorer_text(program("tiny").layers)) == explorer_data(program("tiny").layers)
