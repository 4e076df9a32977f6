"""The prelude: letters with their usual meaning, at every width."""

from __future__ import annotations

import pytest

from mambadsl.compile import load
from mambadsl.files import MODELS
from mambadsl.syntax import tree
from mambadsl.syntax.read import read
from mambadsl.text.source import read as read_source

USUAL = {"M": "mamba2", "A": "attention", "S": "attention", "F": "mlp", "E": "moe"}
PATTERN = "M A S F E"


def layers(d_model: int, pattern: str = PATTERN):
    return load(text=pattern, set={"d_model": str(d_model)}).layers.layers


def test_prelude_only_declares_layers():
    file = read(read_source(MODELS / "std.mdl"))
    assert all(isinstance(statement, tree.Layer) for statement in file.statements)
    assert USUAL.keys() <= {statement.name.text for statement in file.statements}


def test_letters_mean_the_usual_kinds():
    assert [node.layer.branches[0].kind for node in layers(1024)] == [USUAL[c] for c in PATTERN.split()]


@pytest.mark.parametrize("d_model", [32, 64, 96, 128, 200, 512, 768, 1000, 1024, 2560, 4096, 8192, 12288])
def test_legal_at_every_width(d_model):
    scan, full, window, ff, experts = (node.layer.branches[0].fields for node in layers(d_model))
    assert full.heads * full.head_dim == pytest.approx(d_model, abs=64)
    assert scan.heads * scan.head_dim == pytest.approx(2 * d_model, abs=64)
    assert 0 <= ff.d_ff - 8 * d_model / 3 < 64 and ff.d_ff % 64 == 0
    assert experts.top_k * experts.d_ff == pytest.approx(ff.d_ff, abs=128)
    assert (full.window, window.window) == (None, 1024)


def test_two_attention_layers_differ_in_the_window_only():
    _, full, window, *_ = (node.layer.branches[0].fields for node in layers(1024))
    assert full.replace(window=1024) == window


def test_attention_alone_knows_positions():
    """`A F A F` is a GPT: rotary positions, as there is no recurrent layer to tell the order."""
    program = load(text="A F A F")
    assert program.layers.layers[0].layer.branches[0].fields.rope.name == "rope"
    assert program.diagnostics == ()


def test_prelude_letters_yield_to_the_file():
    program = load(text="layer F = mlp(d_ff=64)\nstack { M F }")
    assert program.layers.layers[1].layer.branches[0].fields.d_ff == 64


def test_shipped_layers_scale_with_the_model_that_imports_them():
    text = 'from "std/jamba_v0_1.mdl" import M, E\nmodel small { d_model = 512 }\nstack { M E }'
    scan, experts = (node.layer.branches[0].fields for node in load(text=text).layers.layers)
    assert (scan.d_inner, scan.dt_rank, experts.d_ff) == (1024, 32, 14336)
