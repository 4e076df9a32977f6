"""Models as Megatron's arguments: the shipped ones that fit, and what stands in the others' way."""

from __future__ import annotations

import pytest

from mambadsl import export_megatron, load
from mambadsl.adapt.same import differences
from mambadsl.files import MODELS
from mambadsl.megatron.arguments import from_flags
from mambadsl.megatron.exporter import export_model
from mambadsl.megatron.importer import import_model, pattern_of
from mambadsl.text.diagnostic import MdlError

#: Other shipped models have layers that Megatron's hybrid model has not.
FIT = {
    "bamba_9b", "codestral_mamba_7b", "mamba2_130m", "mamba2_1_3b", "mamba2_2_7b", "mamba2_370m", "mamba2_780m",
    "nemotron_3_nano_30b_a3b", "nemotron_3_super_120b_a12b", "nemotron_h_47b", "nemotron_h_4b", "nemotron_h_56b",
    "nemotron_h_8b", "nemotron_nano_12b_v2", "nemotron_nano_9b_v2",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in MODELS.glob("*.mdl") if path.stem != "std"))
def test_shipped_models(name):
    graph = load(MODELS / f"{name}.mdl").layers
    if name not in FIT:
        with pytest.raises(MdlError) as caught:
            export_model(graph)
        [diagnostic] = caught.value.diagnostics
        assert diagnostic.code.id == "E624" and diagnostic.notes
        return
    args = from_flags(export_model(graph).text())
    assert not list(args.ignored())
    again = import_model(pattern_of(args), args, name=name)
    assert not list(differences(graph, again.graph))


HEAD = "model small { vocab = 512  d_model = 64 }\n"


def text(layers: str, stack: str, **how) -> str:
    return export_megatron(load(text=f"{HEAD}{layers}\nstack {{ {stack} }}"), **how).text


def refused(layers: str, stack: str) -> tuple[str, ...]:
    with pytest.raises(MdlError) as caught:
        text(layers, stack)
    [diagnostic] = caught.value.diagnostics
    assert diagnostic.code.id == "E624"
    return diagnostic.notes


def test_one_flag_a_line():
    lines = text("layer M = mamba2(groups=2)\nlayer A = attention(heads=4)", "M | A M", tp=2).splitlines()
    assert all(line.startswith("--") for line in lines)
    for wanted in (
        "--hybrid-layer-pattern 'M|*M'", "--num-layers 3", "--mamba-num-groups 2", "--num-query-groups 4",
        "--position-embedding-type none", "--attention-dropout 0", "--hidden-dropout 0",
        "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--disable-bias-linear",
    ):
        assert wanted in lines


def test_windows_and_rotations_of_some_layers():
    layers = "layer A = attention(heads=4, rope=rope(theta=500000, fraction=0.5))\nlayer F = mlp(gated=true)"
    found = text(layers, "A(window=100) F A(rope=none) F A F")
    for wanted in (
        "--window-size 99,0", "--window-attn-skip-freq '[1,0,0,0,0,0]'", "--no-rope-freq '[0,0,1,0,0,0]'",
        "--rotary-base 500000", "--rotary-percent 0.5",
    ):
        assert wanted in found.splitlines()


@pytest.mark.parametrize("layers, stack, says", [
    ("layer M = mamba2()\nlayer A = attention(heads=4)", "M M+A", "stack.1: mamba2 + attention side by side"),
    ("layer C = short_conv()", "C", "stack.0: `short_conv` has no letter"),
    ("shared M = mamba2()", "M M", "stack.0: weights that other layers use too"),
    ("layer M = mamba2(d_state=16)", "M M(d_state=32)", "stack.1: `d_state` is 32 here, 16 there"),
    ("layer A = attention(heads=4)\nlayer L = mla(heads=4)", "A L", "stack.1: latent attention, beside the attention"),
    ("layer M = mamba2(conv_bias=false)", "M", "stack.0: `conv_bias` is false here, true there"),
    ("layer F = mlp(act=relu)", "F", "stack.0: `act` is relu here, gelu there"),
    ("layer F = mlp(act=silu)", "F", "stack.0: `gated` is false here, true there"),
    ("layer A = attention(heads=4, window=4)", "A A(window=8)", "stack.1: `window` is 8 here, 4 there"),
    ("layer L = mla(heads=4, norm_eps=1e-5, rope=none)", "L", "stack.0: `rope` is none here"),
    ("layer M = mamba2(residual=post)", "M", "stack.0: `residual` is post here, pre there"),
    ("layer E = moe(gated=true, act=silu, router=mlp)", "E", "`--moe-router-score-function` is `mlp`"),
])
def test_what_stands_in_the_way(layers, stack, says):
    assert any(says in note for note in refused(layers, stack))


def test_ranks_that_cannot_share():
    with pytest.raises(MdlError) as caught:
        text("layer M = mamba2(groups=2, heads=8, head_dim=16)", "M", tp=4)
    assert [d.code.id for d in caught.value.diagnostics] == ["E202"]
