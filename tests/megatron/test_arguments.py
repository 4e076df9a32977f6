"""Arguments as people have them, and the graphs that they make."""

from __future__ import annotations

import json

import pytest

from mambadsl import import_megatron, load
from mambadsl.compile import program_from_graph
from mambadsl.files import MODELS
from mambadsl.megatron.arguments import from_flags, from_mapping, read_arguments
from mambadsl.megatron.exporter import export_model
from mambadsl.megatron.flags import FLAGS, flag_of, spellings
from mambadsl.megatron.importer import import_model
from mambadsl.megatron.pattern import read_pattern
from mambadsl.text.diagnostic import MdlError

SMALL = """
--hidden-size 256 --vocab-size 500 --num-attention-heads 4 --position-embedding-type none --hidden-dropout 0
--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
"""


def graph(pattern: str, flags: str = "", *, base: str = SMALL):
    return import_model(read_pattern(pattern), from_flags(f"{base} {flags}"), name="small").graph


def fields(pattern: str, flags: str = "", *, at: int = 0, base: str = SMALL):
    return graph(pattern, flags, base=base).layers[at].layer.branches[0].fields


def refused(pattern: str, flags: str = "", *, base: str = SMALL) -> str:
    with pytest.raises(MdlError) as caught:
        graph(pattern, flags, base=base)
    assert {d.code.id for d in caught.value.diagnostics} <= {"E620", "E621"}
    return str(caught.value)


NANO = """
--hidden-size 2688 --mamba-num-heads 64 --mamba-head-dim 64 --mamba-state-dim 128 --mamba-num-groups 8
--num-attention-heads 32 --group-query-attention --num-query-groups 2 --kv-channels 128 --num-experts 128
--ffn-hidden-size 1856 --moe-ffn-hidden-size 1856 --moe-shared-expert-intermediate-size 3712 --moe-router-topk 6
--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5
--squared-relu --disable-bias-linear --normalization RMSNorm --vocab-size 131072 --seq-length 8192
--untie-embeddings-and-output-weights --position-embedding-type none --hidden-dropout 0 --moe-grouped-gemm
"""
NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def test_nemotron_3_nano():
    """The parameters that Megatron counts, and the layers of the published model."""
    found = program_from_graph(graph(NANO_PATTERN, base=NANO))
    assert found.cost().params == 31_577_937_344
    published = load(MODELS / "nemotron_3_nano_30b_a3b.mdl").layers
    kinds = [[node.layer.branches[0].kind for node in g.layers] for g in (found.layers, published)]
    assert kinds[0] == kinds[1]


def test_megatrons_own_small_model():
    """Hidden 256, 4 heads, 100 rows, every default of TransformerConfig: the parameters that its test asserts."""
    args = from_mapping(dict(
        hidden_size=256, num_attention_heads=4, padded_vocab_size=100, position_embedding_type="none",
        untie_embeddings_and_output_weights=True,
    ))
    found = program_from_graph(import_model(read_pattern("M*-"), args, name="small").graph)
    assert found.cost().params == 1_774_872


def test_the_three_forms_say_the_same(tmp_path):
    script = tmp_path / "train.sh"
    script.write_text(
        "#!/bin/bash\n# --hidden-size 1\nHIDDEN=256\noptions=\" \\\n  --hidden-size ${HIDDEN} --num-layers=3 \\\n"
        "  --hybrid-layer-pattern M-*  --swiglu --norm-epsilon 1e-6\"\ntorchrun x.py $options > log.txt\n"
    )
    names = dict(hidden_size=256, num_layers=3, hybrid_layer_pattern="M-*", swiglu=True, layernorm_epsilon=1e-6)
    (tmp_path / "a.json").write_text(json.dumps(names))
    (tmp_path / "a.yaml").write_text(
        "ENV_VARS:\n  A: 1\nMODEL_ARGS:\n  --hidden-size: 256\n  --num-layers: 3\n  --hybrid-layer-pattern: M-*\n"
        "  --swiglu: true\n  --norm-epsilon: 1.0e-6\n"
    )
    for name in "train.sh", "a.json", "a.yaml":
        found = read_arguments(tmp_path / name)
        assert {key: given.value for key, given in found.given.items()} == names, name
        assert all(given.span is not None for given in found.given.values())
        assert not list(found.ignored())


def test_flags_are_written_as_they_are_read():
    for name, flag in FLAGS.items():
        value = next(v for v in (True, 7, "word", (128, 0), (0, 1, 1), ("a", "b")) if _reads(flag, v))
        if value is True:
            value = not flag.default
        words = flag_of(name, value)
        assert from_flags(" ".join(words)).given[name].value == flag.read(value), name
        assert spellings()[words[0].removeprefix("--").replace("-", "_")][0] == name


def _reads(flag, value):
    try:
        return flag.read(value) == value and type(flag.read(value)) is type(value)
    except (ValueError, TypeError):
        return False


def test_what_was_not_looked_at():
    found = from_flags("--hidden-sise 3 --lr 1e-4 --frobnicate a b --adam-beta1 0.9 --micro-batch-size 4")
    texts = [(d.message, d.help, d.span.text) for d in found.ignored()]
    assert texts == [
        ("`--hidden-sise` is not looked at", ("did you mean `hidden-size`?",), "--hidden-sise 3"),
        ("`--frobnicate` is not looked at", (), "--frobnicate a"),
    ]


@pytest.mark.parametrize("text, says", [
    ("--hidden-size many", "`hidden_size` must be a whole number, not `many`"),
    ("--hidden-size", "`hidden_size` must be a whole number"),
    ("--hidden-size $H", "`$H` is not set in the file"),
    ("H=1\nH=2\n--hidden-size $H", "`$H` is set to `1` and `2`"),
])
def test_what_cannot_be_read(text, says):
    with pytest.raises(MdlError) as caught:
        from_flags(text)
    assert says in str(caught.value) and caught.value.diagnostics[0].code.id == "E621"


def test_what_is_not_needed_may_be_unset():
    """A script's variables count where they say what model it is."""
    found = from_flags("--hidden-size 8 --global-batch-size $B")
    assert found.hidden_size == 8 and found.unknown["global_batch_size"].value == "$B"
    assert from_mapping({"spec": "[a.b hybrid_stack_spec]"}).spec == ("a.b", "hybrid_stack_spec")


def test_hostile_files(tmp_path):
    for name, text in (
        ("a.json", "{" * 50_000), ("a.yaml", "a: [" * 5_000), ("a.json", "[1]"), ("b.yaml", "a: b: c"),
        ("a.sh", "--no-rope-freq ([0]*9999)*9999"), ("a.sh", "--window-attn-skip-freq __import__('os')"),
        ("a.sh", "\0"), ("a.yaml", "a: !!python/object/apply:os.getcwd []"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(MdlError):
            read_arguments(tmp_path / name)


# ---- what arguments mean


def test_defaults_are_megatrons():
    text = refused("M*-", base="--hidden-size 256 --vocab-size 512 --num-attention-heads 4")
    assert "`--position-embedding-type` is `learned_absolute`; with a counterpart: `none`, `rope`, `yarn`" in text
    f = fields("M")
    assert (f.heads, f.head_dim, f.d_state, f.groups, f.d_conv, f.gated_norm) == (8, 64, 128, 8, 4, "after_gate")
    assert graph("M").model.vocab == 512  # padded to a multiple of 128
    assert graph("M", "--tensor-model-parallel-size 8").model.vocab == 1024


def test_what_is_needed():
    text = refused("M*-E", base="--disable-bias-linear --position-embedding-type none")
    for flag in "--hidden-size", "--vocab-size", "--num-attention-heads", "--num-experts":
        assert f"`{flag}` is needed and not given" in text


@pytest.mark.parametrize("flags, wanted", [
    ("--swiglu", ("silu", True, 640)), ("--squared-relu", ("relu2", False, 1024)),
    ("--no-bias-gelu-fusion", ("gelu", False, 1024)), ("--swiglu --ffn-hidden-size 96", ("silu", True, 96)),
])
def test_activations(flags, wanted):
    f = fields("-", flags)
    assert (f.act, f.gated, f.d_ff) == wanted


@pytest.mark.parametrize("flags, wanted", [
    ("", (0, 0, 0)), ("--moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3", (0.01, 0.001, 0)),
    ("--moe-router-load-balancing-type seq_aux_loss sinkhorn --moe-aux-loss-coeff 0.5 0.25", (0.5, 0, 0)),
    ("--moe-router-load-balancing-type none --moe-aux-loss-coeff 0.5", (0, 0, 0)),
    ("--moe-router-score-function sigmoid --moe-router-enable-expert-bias", (0, 0, 0.001)),
    (
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 5e-3 "
        "--moe-router-load-balancing-type seq_aux_loss global_aux_loss --moe-aux-loss-coeff 0.25", (0.5, 0, 0.005),
    ),
])
def test_balanced_experts(flags, wanted):
    f = fields("E", f"--num-experts 8 {flags}")
    assert (f.aux_loss, f.z_loss, f.bias_rate) == wanted
    written = export_model(graph("E", f"--num-experts 8 {flags}")).text()
    again = fields("E", base=written)
    assert (again.aux_loss, again.z_loss, again.bias_rate) == wanted


def test_a_fused_bias_is_an_approximation():
    base = SMALL.replace("--disable-bias-linear", "")
    f = graph("-", base=base).layers[0].layer.branches[0].fields
    assert (f.act, f.bias) == ("gelu_tanh", True)


def test_windows_and_rotations_by_layer():
    """Rows and steps count all layers, from 1, and a token sees itself beside its window."""
    flags = "--window-size 127,0 --window-attn-skip-freq 3 --position-embedding-type rope --no-rope-freq [0]*4+[1,0]"
    found = [node.layer.branches[0].fields for node in graph("*-****", flags).layers]
    assert [f.window for i, f in enumerate(found) if i != 1] == [128, None, 128, 128, None]
    assert [f.rope.name for i, f in enumerate(found) if i != 1] == ["rope", "rope", "rope", "none", "rope"]
    assert "has 2 entries" in refused("M-*", "--position-embedding-type rope --no-rope-freq [0,1]")
    assert "a token sees none after it" in refused("*", "--window-size 127,127")


def test_numbers_that_the_pattern_says_otherwise():
    flags = from_flags(f"{SMALL} --num-layers 3 --mtp-num-layers 1 --swiglu")
    texts = [d.message for d in import_model(read_pattern("M/-/-"), flags, name="small").diagnostics]
    assert texts == [
        "`--num-layers` is 3, and the pattern has 1 layers: Megatron goes by that",
        "`--mtp-num-layers` is 1, and the pattern has 2 predicted tokens: Megatron goes by that",
    ]


def test_grouped_queries_must_be_asked_for():
    assert fields("*", "--group-query-attention --num-query-groups 2").kv_heads == 2
    assert fields("*").kv_heads == 4
    assert "says nothing without `--group-query-attention`" in refused("*", "--num-query-groups 2")


@pytest.mark.parametrize("pattern, flags, says", [
    ("M", "--use-mup", "`--use-mup` scales by widths"),
    ("M", "--spec a gated_delta_product_stack_spec", "is `gated_delta_product_stack_spec`"),
    ("*", "--rotary-interleaved", "turns neighbouring channels"), ("-", "--quick-geglu", "has no counterpart"),
    ("*", "--use-rope-scaling", "is left out by hybrid models"), ("MD", "", "`D`, DeepSeek sparse attention"),
    ("G", "", "`--swiglu` is needed where there are layers `G`"), ("+", "", "`--qk-layernorm` must be on"),
    ("E", "--num-experts 4 --moe-router-score-function sqrtsoftplus", "with a counterpart: `sigmoid`, `softmax`"),
    ("M", "--mamba-head-dim 60", "does not divide twice the hidden size"),
    ("M", "--hybrid-layer-pattern M-", "is another pattern than `M`"),
    ("*", "--qk-layernorm --normalization LayerNorm", "queries are normed by RMSNorm only"),
])
def test_what_has_no_counterpart(pattern, flags, says):
    assert says in refused(pattern, flags)


def test_places_are_in_both_texts():
    """What the checks find points into the pattern."""
    with pytest.raises(MdlError) as caught:
        program_from_graph(graph("M*", "--mamba-num-groups 3"))
    diagnostic = caught.value.diagnostics[0]
    places = [span for span in (diagnostic.span, *(label.span for label in diagnostic.labels)) if span]
    assert any(span.source.name == "<arguments>" and "--mamba-num-groups 3" in span.text for span in places)


def test_cuts_and_predicted_tokens():
    found = graph("M*|M-/*-/*-", "--swiglu --mtp-use-repeated-layer")
    assert [node.cut_after for node in found.layers] == [False, True, False, False]
    assert (found.mtp.settings.depths, found.mtp.settings.weights) == (2, "shared")
    cut = graph("M*M-", "--swiglu --pipeline-model-parallel-size 2")
    assert [node.cut_after for node in cut.layers] == [False, True, False, False]
    ends = "--swiglu --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1"
    assert [node.cut_after for node in graph("M*M-", ends).layers] == [True, False, False, False]
    lost = ends + " --decoder-last-pipeline-num-layers 1"
    assert "2 layers are in no stage" in refused("M*M-", lost)


def test_older_arguments(tmp_path):
    (tmp_path / "a.sh").write_text(f"{SMALL} --hybrid-attention-ratio 0.3 --hybrid-mlp-ratio 0.3 --num-layers 10")
    assert import_megatron(tmp_path / "a.sh").imported.pattern.main == "M-*MM*-*M-"
    (tmp_path / "b.sh").write_text(
        f"{SMALL} --hybrid-override-pattern M- --mtp-hybrid-override-pattern '*-' --mtp-num-layers 2"
    )
    assert import_megatron(tmp_path / "b.sh").imported.pattern.source.text == "M-/*-/*-"


def test_a_pattern_alone():
    """The layers of this library, with its defaults."""
    assert import_megatron("M-*E").program.layers.layers[0].layer.branches[0].fields.heads == 32
