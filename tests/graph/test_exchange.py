"""networkx and back: equal where nothing was edited, checked and writable where something was, and E060 for
what is no model."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import networkx as nx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import Author

from mambadsl import MdlError, from_networkx, load, make_layer
from mambadsl.files import MODELS
from mambadsl.graph.exchange import layers_from_networkx, to_networkx
from mambadsl.graph.unroll import unroll
from mambadsl.kinds.values import Values, Variant
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.source import from_text

TEXT = """
model toy { d_model = 64 vocab = 100 }
layer M = mamba2()
layer F = mlp(d_ff=128)
layer A = attention(heads=4)
shared S = [A F]
stack { M F | M S M S }
"""


def graph(text: str = TEXT):
    return load(text=text).graph


def labels(program) -> str:
    return " ".join(n.layer.branches[0].kind[:3] for n in program.layers.layers)


def taken_back(g):
    """The program; and its text compiles to the same graph."""
    program = from_networkx(g)
    assert load(text=program.write()).layers == program.layers
    return program


def refused(g, *words: str) -> str:
    with pytest.raises(MdlError) as caught:
        from_networkx(g)
    found = caught.value.diagnostics
    assert {d.code.id for d in found} == {"E060"}, str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


# ---- nothing edited


@pytest.mark.parametrize("name", sorted(p.stem for p in MODELS.glob("*.mdl") if p.stem != "std"))
def test_published_models(name):
    layers = load(MODELS / f"{name}.mdl").layers
    assert layers_from_networkx(to_networkx(layers)) == layers


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_random_models(seed):
    layers = unroll(resolve(read(from_text(Author(Random(seed), most=4).file()))))
    assert layers_from_networkx(to_networkx(layers)) == layers


def test_what_users_see():
    g = graph()
    assert isinstance(g, nx.DiGraph) and g.graph["name"] == "toy" and g.graph["model"].d_model == 64
    assert list(g)[0] == "embed" and list(g)[-1] == "head"
    assert g.nodes["stack.0"]["kind"] == "mamba2" and g.nodes["stack.1"]["cut_after"]
    assert g.edges["stack.0", "stack.1"]["tensors"] == {"x": 64}
    assert nx.is_directed_acyclic_graph(g) and nx.shortest_path_length(g, "embed", "head") == 9


# ---- edited


def test_a_layer_removed():
    g = graph()
    g.remove_node("stack.0")
    g.add_edge("embed", "stack.1", tensors={"x": 64})
    program = taken_back(g)
    assert labels(program) == "mlp mam att mlp mam att mlp"
    assert [n.path for n in program.layers.nodes if n.cut_after] == ["stack.0"]
    assert g.nodes["stack.1"]["kind"] == "mlp"  # the edited graph itself stays as it is


def test_a_layer_inserted():
    g = graph()
    g.add_node("mine", kind="attention", fields={"heads": 2, "rope": Variant("rope", Values(theta=1e6))})
    g.remove_edge("stack.0", "stack.1")
    nx.add_path(g, ["stack.0", "mine", "stack.1"])
    program = taken_back(g)
    new = program.layers.layers[1].layer.branches[0].fields
    assert (new.heads, new.kv_heads, new.head_dim, new.rope.theta, new.window) == (2, 2, 32, 1e6, None)


def test_fields_replaced():
    g = graph()
    model = g.graph["model"]
    g.nodes["stack.0"]["layer"] = make_layer("attention", model=model, heads=4, window=16, scale=None)
    spec = g.nodes["stack.2"]["layer"]
    branch = spec.branches[0]
    fields = branch.fields.replace(d_conv=3)
    g.nodes["stack.2"]["layer"] = replace(spec, branches=(replace(branch, fields=fields),))
    program = taken_back(g)
    assert program.layers.layers[0].layer.branches[0].fields.window == 16
    assert program.layers.layers[2].layer.branches[0].fields.d_conv == 3


def test_two_layers_swapped():
    g = graph("M A F")
    g.remove_edges_from([("embed", "stack.0"), ("stack.0", "stack.1"), ("stack.1", "stack.2")])
    nx.add_path(g, ["embed", "stack.1", "stack.0", "stack.2"])
    assert labels(taken_back(g)) == "att mam mlp"


def test_a_layer_copied_has_its_own_weights():
    g = graph("M A F")
    g.add_node("again", **g.nodes["stack.1"])
    g.remove_edge("stack.1", "stack.2")
    nx.add_path(g, ["stack.1", "again", "stack.2"])
    program = taken_back(g)
    assert [n.owner for n in program.layers.layers] == [f"stack.{i}" for i in range(4)]


def test_a_layer_that_reads_the_embedding():
    g = graph()
    g.nodes["stack.2"]["layer"] = make_layer(
        "attention", model=g.graph["model"], heads=4, input="with_embedding"
    )
    refused(g, "`stack.2` reads the tensor `x0`", "add it")
    g.add_edge("embed", "stack.2", tensors={"x0": 64})
    assert taken_back(g).layers.layers[2].layer.sub.input == "with_embedding"


def test_a_layer_that_takes_what_another_gives():
    g = graph("M A F A F")
    for path, more in ("stack.1", dict(gives="kv")), ("stack.3", dict(takes="kv")):
        g.nodes[path]["layer"] = make_layer("attention", model=g.graph["model"], **more)
    refused(g, "`stack.3` reads the tensor `kv` of `stack.1`", "add it")
    g.add_edge("stack.1", "stack.3", tensors={"kv": 2048})
    assert taken_back(g).layers.carried == {"kv"}
    g.nodes["stack.3"]["layer"] = g.nodes["stack.1"]["layer"]
    refused(g, "nothing in `stack.3` reads the tensor `kv` of `stack.1`")


def test_a_layer_aside_of_the_stream():
    g = graph("M A F")
    g.nodes["stack.1"]["layer"] = make_layer("attention", model=g.graph["model"], heads=4, residual="aside")
    refused(g, "`stack.2` reads the tensor `t` of `stack.1`", "add it")
    g.edges["stack.1", "stack.2"]["tensors"]["t"] = g.graph["model"].d_model
    assert "residual=aside" in taken_back(g).write()
    g.edges["stack.0", "stack.1"]["tensors"]["t"] = g.graph["model"].d_model
    refused(g, "nothing in `stack.1` reads the tensor `t` of `stack.0`")


def test_weights_that_become_shared():
    g = graph("M A F A")
    for node in ("stack.1", "stack.3"):
        g.nodes[node]["owner"] = "shared.T"
    program = taken_back(g)
    assert program.cost().params < load(text="M A F A").cost().params
    assert "shared T = " in program.write()


def test_other_settings():
    g = graph("M A F")
    g.graph["model"] = g.graph["model"].replace(vocab=77)
    g.graph["name"] = "other"
    assert taken_back(g).write().startswith("model other {\n  vocab = 77\n")
    g.graph["model"] = g.graph["model"].replace(vocab=0)
    with pytest.raises(MdlError, match="`vocab` must be at least 1"):
        from_networkx(g)


def test_checks_run_again():
    g = graph("A F")
    g.nodes["stack.0"]["layer"] = make_layer("attention", model=g.graph["model"], heads=6, kv_heads=4)
    with pytest.raises(MdlError, match="E204"):
        from_networkx(g)


def test_wrong_fields_of_a_new_layer():
    g = graph("A F")
    g.nodes["stack.0"].pop("layer")
    for fields, code in (({"headz": 3}, "E022"), ({"heads": 0}, "E040"), ({"heads": float("nan")}, "E040")):
        g.nodes["stack.0"]["fields"] = fields
        with pytest.raises(MdlError, match=code):
            from_networkx(g)
    g.nodes["stack.0"].update(kind="mamba9", fields={})
    with pytest.raises(MdlError, match="E021"):
        from_networkx(g)


def test_make_layer_refuses_what_the_text_would():
    model = load(text="M").layers.model
    for kind, fields, code in (
        ("attention", {"rope": Variant("ropee")}, "E040"),
        ("mamba9", {}, "E021"),
        ("mlp", {"d_f": 1}, "E022"),
        ("mlp", {"d_ff": 1.5}, "E040"),
        ("mlp", {"act": object()}, "E040"),
        ("mlp", {"dropout": "x"}, "E040"),
    ):
        with pytest.raises(MdlError, match=code):
            make_layer(kind, model=model, **fields)


def test_make_layer():
    model = load(text="M").layers.model
    made = make_layer(
        "mamba2", model=model, heads=4, dt_limit=(0, None), norm=Variant("layernorm"), dropout=0.5
    )
    text = "M(heads=4, dt_limit=[0, inf], norm=layernorm, dropout=0.5)"
    (node,) = load(text=f"layer M = mamba2() stack {{ {text} }}").layers.layers
    assert made == node.layer


# ---- no model at all


def edits():
    """Functions that break a graph, by name."""

    def circle(g):
        g.add_edge("stack.3", "stack.0", tensors={"x": 64})

    def detached(g):
        g.add_node("lonely", kind="mlp")

    def fork(g):
        g.add_edge("stack.0", "stack.2", tensors={"x": 64})

    def gap(g):
        g.remove_edge("stack.0", "stack.1")

    def no_embed(g):
        g.remove_node("embed")

    def no_head(g):
        g.remove_node("head")

    def two_heads(g):
        g.add_node("head2", role="head")
        g.add_edge("stack.6", "head2", tensors={"x": 64})

    def head_in_the_middle(g):
        g.nodes["stack.1"]["role"] = "head"

    def layer_as_embed(g):
        g.nodes["embed"]["role"] = "layer"

    def unknown_role(g):
        g.nodes["stack.1"]["role"] = "king"

    def wrong_tensor(g):
        g.edges["stack.0", "stack.1"]["tensors"]["kv"] = 3

    def no_reader(g):
        g.add_edge("embed", "stack.3", tensors={"x0": 64})

    def tensors_of_nothing(g):
        g.edges["stack.0", "stack.1"]["tensors"] = 7

    def no_layer(g):
        g.nodes["stack.1"]["layer"] = None
        del g.nodes["stack.1"]["kind"]

    def not_a_spec(g):
        g.nodes["stack.1"]["layer"] = "mlp"

    def not_fields(g):
        g.nodes["stack.1"].update(layer=None, fields=3)

    def no_model(g):
        del g.graph["model"]

    def bad_name(g):
        g.graph["name"] = "Not A Name"

    def half_a_shared_item(g):
        g.remove_node("stack.3")
        nx.add_path(g, ["stack.2", "stack.4"])

    def shared_with_other_fields(g):
        g.nodes["stack.3"]["layer"] = make_layer("attention", model=g.graph["model"], heads=2)

    def cut_inside_a_shared_item(g):
        g.nodes["stack.3"]["cut_after"] = True

    def empty(g):
        g.clear_edges()

    def tail_from_nowhere(g):
        g.add_node("mtp.0.in", role="mtp_in")

    def name_of_shared(g):
        g.nodes["stack.0"]["owner"] = "shared.not a name"

    return dict(locals())


MALFORMED = {
    "circle": "in a circle: stack.",
    "detached": "not on the way",
    "fork": "lead to one node",
    "gap": "follows nothing",
    "no_embed": "must be there",
    "no_head": "lead to one node|must be there",
    "two_heads": "`head` are one node each",
    "head_in_the_middle": "one node each",
    "layer_as_embed": "one node each",
    "unknown_role": "`king`",
    "wrong_tensor": "reads the tensor `kv`",
    "no_reader": "nothing in `stack.3` reads the tensor `x0`",
    "tensors_of_nothing": "`tensors` of the edge",
    "no_layer": "neither `layer` nor `kind`",
    "not_a_spec": "no LayerSpec",
    "not_fields": "is no layer",
    "no_model": "no `model` attribute",
    "bad_name": "no name for a model",
    "half_a_shared_item": "no text",
    "shared_with_other_fields": "no text",
    "cut_inside_a_shared_item": "no text",
    "empty": "follows nothing",
    "tail_from_nowhere": "no text|reads",
    "name_of_shared": "no text",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_graphs(name):
    g = graph()
    edits()[name](g)
    text = refused(g)
    assert re.search(MALFORMED[name], text), text


@pytest.mark.parametrize("thing", [None, 3, "graph", nx.Graph(), nx.MultiDiGraph(), nx.DiGraph()], ids=str)
def test_other_things(thing):
    refused(thing)


def test_keys_of_any_sort():
    g = nx.relabel_nodes(graph("M A F"), {"stack.0": 0, "stack.1": ("a", 1)})
    assert labels(taken_back(g)) == "mam att mlp"
