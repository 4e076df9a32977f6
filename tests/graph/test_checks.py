"""The checker as a whole: seal, facts, speed, order, merged uses, graphs without text."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambadsl.graph.checks import NO_FACTS, RUN, CheckedGraph, Facts, Subject, check, rules
from mambadsl.graph.checks.legal import divisors, divisors_near, multiples_near, near
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.unroll import unroll
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import from_text

pytestmark = pytest.mark.usefixtures("frozen_heap")
MODELS = Path(__file__).parent.parent.parent / "models"


def graph_of(text: str) -> LayerGraph:
    return unroll(resolve(read(from_text(text, name="model.mdl"))))


def codes(graph: LayerGraph, **facts) -> list[str]:
    try:
        return [d.code.id for d in check(graph, Facts(**facts)).diagnostics]
    except MdlError as error:
        return [d.code.id for d in error.diagnostics]


def mamba(**fields: int) -> LayerGraph:
    args = ", ".join(f"{name}={value}" for name, value in fields.items())
    return graph_of(f"layer M = mamba2({args}) stack {{ M }}")


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.mdl")), ids=lambda p: p.stem)
def test_published_models_are_clean(path):
    text = path.read_text(encoding="utf-8")
    if "stack {" not in text:
        pytest.skip("a library without a stack")
    graph = graph_of(text)
    assert codes(graph) == []
    assert codes(graph, mode="decode", parts="reference") == []


@pytest.mark.parametrize(
    "name", ["nemotron_h_8b", "bamba_9b", "falcon_h1_7b", "granite_4_0_h_small", "jamba_v0_1", "mamba2_130m"]
)
def test_published_models_suit_the_kernels_in_training(name):
    text = (MODELS / f"{name}.mdl").read_text(encoding="utf-8")
    graph = graph_of(f"{text}\nparts old : fused {{ mamba2.core = mamba_ssm.core }}")
    assert codes(graph, parts="old", length=4096) == []


@pytest.mark.parametrize("pattern", ["M M M A", "M F M F A F", "M*4 A M*4 A", "M+A F", "M E"])
def test_small_patterns_are_fine(pattern):
    for d_model in (32, 64, 128):
        found = codes(graph_of(f"model tiny {{ d_model = {d_model} }} stack {{ {pattern} }}"))
        assert [code for code in found if code[0] != "I"] == []


def test_only_check_makes_a_checked_graph():
    checked = check(graph_of("M M M A"))
    assert isinstance(checked, CheckedGraph)
    with pytest.raises(TypeError):
        CheckedGraph(checked.graph, checked.facts, ())
    with pytest.raises(TypeError, match="check"):
        CheckedGraph(checked.graph, checked.facts, (), object())
    with pytest.raises(AttributeError):
        checked.graph = None


def test_errors_carry_the_warnings_too():
    with pytest.raises(MdlError) as found:
        check(graph_of("layer M = mamba2(heads=8, groups=3, chunk=50) stack { M }"), Facts(target="mamba_ssm"))
    ids = [d.code.id for d in found.value.diagnostics]
    assert ids[0] == "E103" and ids[-1] == "W109"


def test_facts_refuse_what_no_run_has():
    facts = {"tp": 0, "target": "nowhere", "dtype": "int8", "mode": "both", "precision": "fp6"}
    for name, wrong in facts.items():
        with pytest.raises(ValueError, match=name):
            Facts(**{name: wrong})


def test_one_problem_used_by_two_layers_is_one_error():
    """A and its copy W have the same wrong argument at the same place."""
    graph = graph_of("""
layer A = attention(heads=32, kv_heads=12, head_dim=64)
layer W = A(window=512)
stack { M*20 [A W]*2 }
""")
    with pytest.raises(MdlError) as found:
        check(graph)
    (error,) = found.value.diagnostics
    assert error.span.text == "kv_heads=12"
    assert error.notes == ("used 4 times: A and W (stack.20, stack.22, stack.21, ...), in line 4",)


def test_equal_problems_at_two_places_are_two_errors():
    bad = "mamba2(heads=8, groups=3)"
    graph = graph_of(f"layer M = {bad}\nlayer N = {bad}\nstack {{ M N }}")
    with pytest.raises(MdlError) as found:
        check(graph)
    assert [d.span.line for d in found.value.diagnostics] == [1, 2]


def test_a_layer_of_another_file_is_shown_where_it_is_used():
    with pytest.raises(MdlError) as found:
        check(graph_of("# two lines\nM"), Facts(tp=2))
    (error,) = found.value.diagnostics
    assert error.span.source.name.endswith("std.mdl")
    assert [(label.span.line, label.text) for label in error.labels] == [(2, "used here")]


def test_graphs_without_text_are_checked_too():
    """As from the builder or networkx: no places, no origins."""
    graph = graph_of("layer M = mamba2(heads=8, groups=3, chunk=50) stack { M*3 }")
    nodes = []
    for node in graph.nodes:
        layer = node.layer
        if layer is not None:
            bare = tuple(replace(m, span=None, origins={}, chain=()) for m in layer.branches)
            layer = replace(layer, branches=bare, span=None, origins={})
        nodes.append(replace(node, layer=layer, span=None, trail=()))
    bare = replace(graph, nodes=tuple(nodes), file=None)
    with pytest.raises(MdlError) as found:
        check(bare, Facts(target="mamba_ssm"))
    assert [(d.code.id, d.span) for d in found.value.diagnostics] == [("E103", None), ("W109", None)]
    assert found.value.diagnostics[0].label == "8 heads cannot be split into 3 groups"
    assert found.value.diagnostics[0].notes == ("used 3 times: M (stack.0, stack.1, stack.2)",)


def test_ten_thousand_layers_take_a_moment():
    graph = graph_of("stack { [M F M F M F A E]*1250 }")
    assert len(graph.layers) == 10_000
    start = time.thread_time()
    check(graph, Facts(target="megatron", lora_targets=("in_proj",), length=2048))
    assert time.thread_time() - start < 0.5


def test_wild_numbers_answer_quickly():
    big = 2**40
    graph = graph_of(f"""
model m {{ vocab = {big - 1} context = {big} }}
layer M = mamba2(heads={big - 1}, groups=7, head_dim={big}, d_state={big}, norm_groups=11)
layer N = mamba1(d_inner={big}, d_state={big})
layer A = attention(heads={big - 1}, kv_heads=7, head_dim=3, rope=rope(fraction=0.001))
layer E = moe(experts={big - 1}, top_k={big}, router=sigmoid(groups=7, top_groups=9))
stack {{ M N A E }}
""")
    start = time.thread_time()
    facts = dict(target="mamba_ssm", tp=8, cp=8, precision="fp8", max_sequences=10**9, memory_bytes=1)
    assert len(codes(graph, **facts)) > 10
    assert time.thread_time() - start < 1


def test_checks_load_nothing_slow():
    slow = ("torch", "numpy", "lark", "networkx")
    code = f"import sys, mambadsl.graph.checks; print([m for m in {slow} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- rules against the plain definition


@given(st.integers(1, 96), st.integers(1, 96))
def test_groups_rule_is_division(heads, groups):
    assert ("E103" in codes(mamba(heads=heads, groups=groups))) == (heads % groups != 0)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16), st.sampled_from([1, 2, 4, 8, 16]))
def test_context_parallel_rule_is_megatrons(heads_per_group, groups, tp, cp):
    """Megatron: heads per rank divide by cp; groups too, or cp by groups (then each is copied)."""
    heads = heads_per_group * groups
    if groups % tp:
        return
    local_heads, local_groups = heads // tp, groups // tp
    whole = local_groups % cp == 0 if local_groups >= cp else cp % local_groups == 0
    fits = local_heads % cp == 0 and whole
    found = codes(mamba(heads=heads, groups=groups), tp=tp, cp=cp, target="megatron")
    assert ("E203" in found) == (not fits)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
def test_kernel_widths_and_their_help(heads, head_dim, d_state, groups):
    heads *= groups
    given = dict(heads=heads, head_dim=head_dim, d_state=d_state, groups=groups)
    conv = heads * head_dim + 2 * groups * d_state
    rows = conv + heads * head_dim + heads
    try:
        found = check(mamba(**given), Facts(target="mamba_ssm")).diagnostics
    except MdlError as error:
        found = error.diagnostics
    ids = [d.code.id for d in found]
    assert ("E104" in ids) == (conv % 8 != 0)
    assert ("E105" in ids) == (rows % 8 != 0)
    for d in found:
        if d.code.id in ("E104", "E105") and d.help:
            for change in d.help[0].split("`")[1::2]:
                field, value = change.split("=")
                again = codes(mamba(**{**given, field: int(value)}), target="mamba_ssm")
                assert d.code.id not in again and "E103" not in again


@given(st.integers(1, 4000))
def test_divisors_by_trial(n):
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_nearest_values(value, of):
    below_and_above = multiples_near(value, of)
    assert all(m % of == 0 and 0 < abs(m - value) <= of for m in below_and_above)
    assert below_and_above == [v for v in near(value, lambda v: v % of == 0, reach=of)]
    assert set(divisors_near(value, of)) <= set(divisors(value))


#: One model in which every kind of thing that a run may stumble over is there.
AWKWARD = """
model awkward { vocab = 50257 d_model = 192 context = 100_000 tie_embeddings = true }
layer M = mamba2(heads=6, head_dim=64, groups=3, chunk=50, gated_norm=before_gate, conv_bias=false)
layer N = mamba2(heads=5, head_dim=64, groups=1, chunk=64)
layer A = attention(heads=6, kv_heads=3, head_dim=32, window=77)
layer E = moe(experts=6, top_k=2, latent=24)
shared S = [A F]
stack { | M N S [M+A E | N S]*3 A }
"""


@pytest.mark.parametrize("text", [AWKWARD, *(p.read_text() for p in sorted(MODELS.glob("*.mdl")) if p.stem != "std")])
def test_rules_on_runs_have_nothing_to_say_about_a_model_alone(text):
    """They are not asked then, so they must not have anything to say."""
    graph = graph_of(text)
    for rule in rules(RUN):
        assert list(rule.check(Subject(graph, NO_FACTS))) == [], rule.__name__
