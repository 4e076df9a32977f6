"""`--set NAME=VALUE`: what it may change, and that every complaint points into the option's own text."""

from __future__ import annotations

import pytest

import mambadsl
from mambadsl import load
from mambadsl.text.diagnostic import MdlError
from mambadsl.text.render import to_text

TEXT = """
model m { d_model = 128 }
let wide = 2 * d_model
layer F = mlp(d_ff=wide)
layer W = A(window=8)
layer B = [F W]
layer H = F + W
stack { B H }
expect layers == 3
"""


def program(text: str = TEXT, **sets: str):
    return load(text=text, set={name.replace("__", "."): value for name, value in sets.items()})


def d_ff(p) -> int:
    return p.layers.layers[0].layer.branches[0].fields.d_ff


def problem(text: str = TEXT, **sets: str):
    with pytest.raises(MdlError) as caught:
        program(text, **sets)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def test_settings_constants_and_fields():
    assert program(d_model="64").layers.model.d_model == 64
    assert d_ff(program(d_model="64")) == 128
    assert d_ff(program(wide="d_model // 2")) == 64
    assert d_ff(program(F__d_ff="min(wide, 100)")) == 100
    assert program(context="1 + 2").layers.model.context == 3
    assert program(W__window="none").layers.layers[1].layer.branches[0].fields.window is None
    assert program(W__rope="rope(theta=2)").layers.layers[1].layer.branches[0].fields.rope.theta == 2
    both = program(d_model="64", wide="d_model * 3", F__act="relu2")
    assert d_ff(both) == 192 and both.layers.layers[0].layer.branches[0].fields.act == "relu2"


def test_a_bare_pattern_and_a_file_without_a_model_block():
    assert program("M M", d_model="64").layers.model.d_model == 64
    assert program("M M", d_model="64").spec.name == program("M M").spec.name == "text"
    assert program("stack { M }", vocab="64").layers.model.vocab == 64
    assert program("M M", d_model="64").expand()


def test_where_values_came_from_is_said():
    text = program(d_model="64", F__act="relu").expand(origin=True)
    assert "d_model = 64  # --set d_model" in text and "act=relu,  # --set F.act" in text
    assert "d_ff=128,  # <text>:4:15" in text


def test_facts_of_the_file_are_left_unchecked_and_that_is_said():
    p = program(F__act="relu")
    assert [d.code.id for d in p.diagnostics if d.code.id == "I052"] == ["I052"]
    assert p.layers.expects == ()
    assert "expect" not in p.expand()
    assert not [d for d in program().diagnostics if d.code.id == "I052"]
    wrong = TEXT.replace("== 3", "== 4")
    assert program(wrong, d_model="64")
    with pytest.raises(MdlError, match="E050"):
        program(wrong)


@pytest.mark.parametrize(
    "sets, code, place, words",
    [
        (
            {"d_modle": "64"},
            "E048",
            "d_modle",
            ["no setting or constant `d_modle`", "did you mean `d_model`?"],
        ),
        ({"zzzzzzzzz": "64"}, "E048", "zzzzzzzzz", ["there are vocab, d_model"]),
        ({"Q__heads": "1"}, "E048", "Q.heads", ["a layer `Q`", "there are F, W, B, H"]),
        ({"B__d_ff": "1"}, "E048", "B.d_ff", ["`B` is a block", "declared here"]),
        ({"H__d_ff": "1"}, "E048", "H.d_ff", ["`H` is a sum"]),
        ({"W__rope.theta": "1"}, "E048", "W.rope.theta", ["`rope.theta` is no field"]),
        ({"d_model": "3 let y = 4"}, "E048", "let y = 4", ["an option takes one value"]),
        ({"d_model": ""}, "E010", "", ["--set d_model="]),
        ({"d_model": "3 +"}, "E010", "", ["--set d_model=3 +"]),
        ({"d_model": "$"}, "E011", "$", []),
        ({"d_model": "1 / 2"}, "E040", "1 / 2", ["must be a whole number"]),
        ({"d_model": "wid"}, "E040", "wid", ["did you mean `wide`?"]),
        ({"wide": "1 / 0"}, "E041", "0", ["division by zero", "--> --set wide:1:16"]),
        ({"F__d_ff": "0"}, "E040", "0", ["`d_ff` must be at least 1"]),
        ({"F__dff": "4"}, "E022", "F.dff", ["has no field `dff`", "`d_ff`?"]),
        ({"wide": "wide"}, "E025", None, ["needs itself"]),
    ],
)
def test_complaints_point_into_the_option(sets, code, place, words):
    found = problem(**sets)
    shown = to_text(found)
    assert found.code.id == code, shown
    if place is not None:
        assert found.span.source.name.startswith("--set ") and found.span.text == place, shown
        assert found.span.source.text.startswith("--set ")
    for word in words:
        assert word in shown, shown


def test_layers_of_the_prelude_become_the_files_own():
    changed = mambadsl.load(text="M M A", set={"M.heads": "4", "S.window": 7, "d_model": 256})
    heads = [n.layer.branches[0].fields.heads for n in changed.layers.layers]
    assert heads == [4, 4, 4], "A has a head for each 64 channels"
    again = mambadsl.load(text="model text { d_model = 256 } layer M = mamba2(heads=4) stack { M M A }")
    assert changed.layers == again.layers


def test_python_values_are_taken_as_they_are():
    settings = {"d_model": 64, "tie_embeddings": True, "logits_softcap": None, "logits_multiplier": 0.25}
    model = mambadsl.load(text="M A(window=3)", set=settings).layers.model
    assert {name: model[name] for name in settings} == settings


def test_all_options_complain_at_once():
    with pytest.raises(MdlError) as caught:
        program(d_modle="1", Q__x="2", d_model="(")
    assert [d.code.id for d in caught.value.diagnostics] == ["E048", "E048", "E012"]
