"""Graph and spec back to text: writing, expanding, folding; and to JSON. Nothing is lost on any way."""

from __future__ import annotations

import json
import re
import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import Author

from mambadsl.files import MODELS
from mambadsl.graph import json as graph_json
from mambadsl.graph.checks import expects
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.unroll import unroll
from mambadsl.graph.write import write
from mambadsl.kinds.registry import get
from mambadsl.spec.expand import expand
from mambadsl.spec.model import FACTS, MODEL_FIELDS, ModelSpec
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.fold import fold
from mambadsl.syntax.read import read
from mambadsl.syntax.write import write as write_file
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.source import from_text

NAMES = sorted(p.stem for p in MODELS.glob("*.mdl") if p.stem != "std")


def spec(text: str, name: str = "m.mdl") -> ModelSpec:
    return resolve(read(from_text(text, name=name)))


def graph(text: str) -> LayerGraph:
    return unroll(spec(text))


def model(name: str) -> str:
    return (MODELS / f"{name}.mdl").read_text(encoding="utf-8")


def no_way_loses_anything(text: str) -> None:
    s, g = spec(text), graph(text)
    written, expanded = write(g), expand(s)
    assert graph(written) == g, written
    assert write(graph(written)) == written
    assert graph(expanded) == g, expanded
    assert expand(spec(expanded)) == expanded
    assert graph(expand(s, origin=True)) == g
    assert graph_json.loads(graph_json.dumps(g)) == g
    for out in (written, expanded):
        assert write_file(read(from_text(out))) == out


@pytest.mark.parametrize("name", NAMES)
def test_published_models(name):
    no_way_loses_anything(model(name))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_random_models(seed):
    no_way_loses_anything(Author(Random(seed), most=4).file())


SHARED = "layer A = attention(heads=4) "


@pytest.mark.parametrize(
    "text",
    [
        "M",
        "| M | A |",
        "[M | A |]*4",
        "M+A+F",
        "[M+A]*3 M+A+F",
        "M F M F | M F M F",
        "stack { A A(heads=2) A(heads=2, kv_heads=1) A(kv_heads=2) }",
        "layer A = attention(heads=8, kv_heads=8) stack { A A(heads=4, kv_heads=4) A(heads=4, kv_heads=1) }",
        SHARED + "shared S = [A(adapter=lora(rank=4)) F] stack { S(adapter=lora(rank=8)) S S A A(window=3) }",
        SHARED + "shared S = A stack { S(adapter=lora()) S(adapter=lora(rank=2)) A }",
        "shared S = [M F]*2 stack { S S S }",
        "layer P = linear(norm=none, residual=aside) shared S = [A(input=with_embedding, residual=aside) "
        "F(residual=aside, adapter=lora(rank=4, per=segment))] stack { [M*2 S P]*3 M | S P(bias=true) M }",
        "shared S = M+A stack { S S+M }".replace(" S+M", ""),
        "shared S = A(adapter=lora()) stack { S S(adapter=none) }",
        "shared A = attention(heads=2) layer W = A stack { A*2 }".replace(" layer W = A", ""),
        "layer M = mamba1() layer M2 = mamba2() stack { M M2 mamba2(d_conv=3) mamba1(d_conv=3) mlp() }",
        "layer M = mamba2() layer N = mamba2() stack { M N } expect count(N) == 1",
        "stack { A(window=3) A(window=3)*2 A } expect count(A) == 4",
        "layer N = M(norm=layernorm) stack { N N+A M+A A }",
        "layer A2 = A stack { A A2 A(window=1) A2(window=2) attention() }",
        "model m { embedding_multiplier = 1e20 init_std = 1e-300 norm = none } stack { M }",
        "model m { logits_multiplier = 1 / 3 logits_softcap = 30 } stack { M(in_multiplier=2 / 7) }",
        "let layers = 3 let n = 1 / 3 stack { M } expect layers < n * 9 expect params != -n / (1 - n)",
        "stack { M } mtp(depths=3, weights=shared) { [A F]*2 }",
        "shared S = [A F] stack { M } mtp { S S }",
        'stack { M A } parts p : q { A.core = f() mamba2.scan = g(x=1 / 3, y=[-1e-30, "a b"]) } parts q {}',
        "stack { M } parts p { mamba2.scan = f(a=1e300, b=123456789 * 987654321 * 1000007, c=0.0001e-308) }",
        "let x = -1 / 3 stack { M } parts p { mamba2.scan = f(a=x * 1e20 / 7, b=(2 + 9007199254740991)/2) }",
        "stack { mamba2(dt_limit=[0.001, inf], a_range=[0.5, 16.25]) A(rope=rope(scaling=yarn(factor=4))) }",
    ],
    ids=lambda t: t[:40],
)
def test_corners(text):
    no_way_loses_anything(text)


def test_a_written_model_is_short():
    """What people would write: repeats found, only what differs, copies as copies."""
    text = (
        "model toy { d_model = 64 } layer A = attention(heads=4) stack { [M F]*3 A A(window=8) A(window=8) }"
    )
    assert (
        write(graph(text))
        == """\
model toy {
  d_model = 64
}

layer M = mamba2()
layer F = mlp(d_ff=192, gated=true)
layer A = attention(heads=4)

stack {
  [M F]*3 A A(window=8)*2
}

expect layers == 9
expect params == 4484114
"""
    )


@pytest.mark.parametrize("name", ["tiny", "nemotron_h_8b", "falcon_h1_0_5b"])
def test_writing_a_published_model_is_no_longer_than_the_file(name):
    folded = write(graph(model(name)))
    assert len(folded) < 1.5 * len(re.sub(r"(?m)^#.*\n", "", model(name)))


def test_expanded_text_has_every_default():
    text = expand(spec("stack { M A+F }"))
    for layer in (get("mamba2"), get("attention"), get("mlp")):
        for field in layer.fields:
            assert f" {field.name}=" in text, field.name
    for field in MODEL_FIELDS:
        assert f"  {field.name} = " in text


def test_facts_are_the_checker_s():
    """Names that `expand` leaves alone in `expect` lines are those that the checker computes."""
    assert set(FACTS) == set(expects.FACTS)


def test_origins_are_right():
    text = """\
model m { d_model = 64 }
let w = 3
layer A = attention(heads=4,
  head_dim=16)
stack { A A(window=w) }
"""
    out = expand(spec(text, name="dir/m.mdl"), origin=True)
    assert "d_model = 64  # dir/m.mdl:1:11" in out
    assert "vocab = 32768  # default" in out
    assert "heads=4,  # dir/m.mdl:3:21" in out and "head_dim=16,  # dir/m.mdl:4:3" in out
    assert "kv_heads=4,  # default" in out
    assert re.search(r"A\(\s*window=3,  # dir/m.mdl:5:13\s*\)", out)
    assert graph(out) == graph(text)


def test_origins_with_odd_file_names():
    """A file's name cannot add lines to the text."""
    s = spec("stack { M(heads=2) }", name="a\nstack { A }\u2028.mdl")
    assert graph(expand(s, origin=True)) == unroll(s)


def test_imports_and_constants_are_gone(tmp_path):
    (tmp_path / "lib.mdl").write_text(
        "let k = 3\nlayer W = A(window=k)\nlayer M = mamba2(d_conv=3)\nlayer B = [W M]"
    )
    main = tmp_path / "main.mdl"
    main.write_text('from "lib.mdl" import B\nlet n = 2\nstack { B M } expect layers == n + 1')
    from mambadsl.text.source import read as read_source

    s = resolve(read(read_source(main)))
    out = expand(s)
    assert "from" not in out and "let" not in out and "expect layers == 2 + 1" in out
    assert graph(out) == unroll(s)


# ---- folding


def flattened(pattern: str) -> list[str]:
    """A folded row laid out again, by a small reader of its own."""
    words = re.findall(r"\[|\]|\*\d+|[A-Z]\w*|\|", pattern)
    stack: list[list] = [[]]
    for word in words:
        if word == "[":
            stack.append([])
        elif word == "]":
            done = stack.pop()
            stack[-1].append(done)
        elif word[0] == "*":
            stack[-1][-1:] = [stack[-1][-1]] * int(word[1:])
        else:
            stack[-1].append([word])

    def leaves(item):
        return [item[0]] if isinstance(item[0], str) else [leaf for inner in item for leaf in leaves(inner)]

    return leaves(stack[0])


@given(st.lists(st.sampled_from(["M", "A", "F2", "|"]), min_size=1, max_size=60))
def test_folding_and_flattening_gives_the_row_again(row):
    row = [name for before, name in zip(["", *row], row) if not name == before == "|"]
    text = fold(row)
    assert flattened(text) == row
    assert len(text) <= len(" ".join(row)) + 2


@given(st.lists(st.sampled_from("MAF"), min_size=1, max_size=6), st.integers(2, 15), st.integers(1, 4))
def test_repeats_are_found(body, count, outer):
    row = (body * count + ["X"]) * outer
    text = fold(row)
    assert flattened(text) == row and len(text) <= 4 * len(body) + 24


def test_folds_as_people_write_them():
    assert fold(list("MMM")) == "M*3"
    assert fold(list("MFMFA")) == "[M F]*2 A"
    assert fold(list("MFMFMFAMFMFMFA")) == "[[M F]*3 A]*2"
    assert fold(["M + A", "M + A"]) == "[M + A]*2"
    assert fold(["S(a=1)", "S(a=1)", "M"]) == "S(a=1)*2 M"


@pytest.mark.parametrize(
    "row",
    [
        [Random(1).choice("MAFE") for _ in range(10_000)],
        ["M"] * 10_000,
        list("MMMMMMF" * 1400),
        [Random(2).choice(["M", "M", "M", "M", "A"]) for _ in range(10_000)],
        list(("M" * 90 + "F") * 110),
    ],
    ids=["random", "one", "period", "mostly one", "long period"],
)
def test_folding_ten_thousand_names_takes_no_second(row):
    start = time.thread_time()
    text = fold(row)
    assert time.thread_time() - start < 2  # measured: below 0.6 s on a slow machine
    assert flattened(text) == row


# ---- JSON


def test_json_is_canonical():
    first, again = graph("M*3 A"), graph("[M]*3 A")
    assert graph_json.dumps(first) == graph_json.dumps(graph("M*3 A"))
    assert graph_json.dumps(first) == graph_json.dumps(again)
    assert (
        json.loads(graph_json.dumps(first))["sha256"]
        != json.loads(graph_json.dumps(graph("M*2 A")))["sha256"]
    )


def refused(text: str) -> str:
    with pytest.raises(MdlError) as caught:
        graph_json.loads(text, name="g.json")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code.id == "E062" and "g.json" in diagnostic.message
    return diagnostic.message + " ".join(diagnostic.notes)


def test_what_is_not_json_or_another_version():
    for text in ("", "{", "[]", "3", '"x"', "{}", '{"graph": 3, "sha256": 4}', "[" * 100_000, "null"):
        assert "is not a compiled graph" in refused(text)
    text = graph_json.dumps(graph("M"))
    assert "has format 2" in refused(text.replace('"version": 1', '"version": 2'))


def test_a_changed_graph_is_refused():
    text = graph_json.dumps(graph("M A"))
    assert "was changed" in refused(text.replace('"cut_after": false', '"cut_after": true', 1))


def forged(change) -> str:
    """A document whose hash is right and whose content is not."""
    data = json.loads(graph_json.dumps(graph("M A(rope=rope()) parts".replace(" parts", ""))))["graph"]
    change(data)
    return json.dumps({"graph": data, "sha256": graph_json.content_hash(data)})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["nodes"].pop(),
        lambda d: d["edges"].pop(),
        lambda d: d.pop("nodes"),
        lambda d: d.update(nodes=3),
        lambda d: d["nodes"][1].update(layer=7),
        lambda d: d["nodes"][1].update(role="king"),
        lambda d: d["layers"][0]["branches"][0].update(kind="mamba9"),
        lambda d: d["layers"][0]["branches"][0]["fields"].update(heads=0),
        lambda d: d["layers"][0]["branches"][0]["fields"].update(heads="many"),
        lambda d: d["layers"][0]["branches"][0]["fields"].update(heads=None),
        lambda d: d["layers"][0]["branches"][0]["fields"].update(extra=1),
        lambda d: d["layers"][0]["branches"][0]["fields"].pop("heads"),
        lambda d: d["layers"][0].update(branches=[]),
        lambda d: d["layers"][1]["sub"].update(norm={"form": "nono"}),
        lambda d: d["model"].update(d_model=1.5),
        lambda d: d.update(model=[]),
        lambda d: d.update(parts=[3]),
    ],
    ids=range(17),
)
def test_a_forged_graph_is_refused_without_a_crash(change):
    assert refused(forged(change))


def test_a_graph_from_json_checks_and_writes_like_the_first():
    g = graph(model("tiny"))
    again = graph_json.loads(graph_json.dumps(g))
    assert write(again) == write(g)
