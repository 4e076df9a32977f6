"""What is refused, and how it is said: places in config.json, names of tensors, layers that stand in the way."""

from __future__ import annotations

import json
import pickle
import struct

import hf_tiny
import pytest
import torch

import mambadsl
from mambadsl.hf.exporter import export_settings
from mambadsl.hf.folder import export_hf, import_hf
from mambadsl.hf.verify import verify_hf
from mambadsl.text.diagnostic import MdlError

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return hf_tiny.saved("bamba", tmp_path / "theirs")


def changed(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}, indent=2))
    return folder


def refused(code, do):
    with pytest.raises(MdlError) as caught:
        do()
    assert {d.code.id for d in caught.value.diagnostics} == {code}
    return str(caught.value)


@pytest.mark.parametrize("text, says", [
    ("{", "is not JSON"), ("[1]", "holds no settings"), ("{}", "no `model_type`"),
    ('{"model_type": 3}', "no `model_type`"),
    ('{"model_type": "jambaa"}', "did you mean `jamba`"), ('{"model_type": "llama"}', "no counterpart yet"),
    ('{"model_type": "mamba", "vocab_size": "many"}', "does not take"),
    ('{"model_type": "mamba", "vocab_size": "\\ud800"}', ""), ("\x00", "NUL"), ("[" * 100_000, ""),
])
def test_what_is_no_configuration(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MdlError) as caught:
        import_hf(tmp_path)
    assert says in str(caught.value)


def test_no_folder(tmp_path):
    assert "there is no file" in refused("E610", lambda: import_hf(tmp_path / "nowhere"))
    assert "has no config.json" in refused("E610", lambda: import_hf(tmp_path))


def test_settings_without_a_counterpart_point_into_the_file(folder):
    changed(folder, hidden_act="mish", attention_dropout=0.1)
    text = refused("E611", lambda: import_hf(folder))
    assert "`hidden_act` is `mish`; with a counterpart: `silu`" in text
    assert "`attention_dropout` is `0.1`" in text
    assert text.count("config.json:") == 2 and '"hidden_act": "mish"' in text


def test_widths_of_xlstm_without_a_counterpart(tmp_path):
    folder = hf_tiny.saved("xlstm", tmp_path)
    changed(folder, qk_dim_factor=0.3, embedding_dim=64, use_bias=True, weight_mode="fused")
    text = refused("E611", lambda: import_hf(folder))
    assert "`qk_dim_factor` gives 38 channels; they must be a multiple of 64 and of `num_heads`" in text
    assert "`embedding_dim` is 64; only that of `hidden_size`, 128, has a counterpart" in text
    assert "`use_bias` is `True`; only `False`" in text and "`weight_mode` is `fused`; only `single`" in text


def test_ropes_without_a_counterpart(folder):
    changed(folder, rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0], long_factor=[1.0]))
    assert "has the type `longrope`" in refused("E611", lambda: import_hf(folder))


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize("rope, says", [
    (dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[1.0] * 4), "the type `longrope`"),
    ({**YARN, "truncate": False}, "of the type `yarn` has `truncate`"),
    ({**YARN, "partial_rotary_factor": 0.5}, "`partial_rotary_factor` 0.5 beside its scaling"),
    (dict(rope_type="linear", rope_theta=1e4, factor=2.0, mscale_all_dim=1.0), "`linear` has `mscale_all_dim`"),
])
def test_ropes_of_latent_attention_without_a_counterpart(tmp_path, rope, says):
    folder = changed(hf_tiny.saved("bailing_hybrid", tmp_path), rope_parameters=rope)
    assert says in refused("E611", lambda: import_hf(folder))


def test_scales_of_latent_attention_without_a_counterpart():
    program = mambadsl.load("models/ling_3_0_flash.mdl", set={"L.scale": 0.1})
    text = refused("E614", lambda: export_settings(program.layers, family="bailing_hybrid"))
    assert "`scale` of `mla` follows from yarn" in text


def test_settings_that_nobody_looked_at_are_listed(folder):
    changed(folder, attn_layer_indicse=[1], qk_norm=True)
    found = import_hf(folder)
    texts = [str(d.message) for d in found.imported.diagnostics]
    assert len(texts) == 2 and {d.code.id for d in found.imported.diagnostics} == {"W612"}
    assert any("attn_layer_indicse" in text for text in texts)
    assert found.imported.diagnostics[0].help == ("did you mean `attn_layer_indices`?",)
    assert all(d.span is not None for d in found.imported.diagnostics)


def test_settings_that_nobody_looked_at_are_kept(folder, tmp_path):
    changed(folder, qk_norm=True)
    found = import_hf(folder, weights=tmp_path / "ours")
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert json.loads((tmp_path / "again/config.json").read_text())["qk_norm"] is True


def rewritten(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_tensors_that_do_not_fit(folder, tmp_path):
    def change(weights):
        weights["model.layers.0.mamba.AlOG"] = weights.pop("model.layers.0.mamba.A_log")
        weights["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 4)

    rewritten(folder, change)
    text = refused("E613", lambda: import_hf(folder, weights=tmp_path / "ours"))
    assert "missing: `model.layers.0.mamba.A_log`, nearest: `model.layers.0.mamba.AlOG`" in text
    assert "shape of `model.layers.1.self_attn.q_proj.weight`: [3, 4] in the folder, [32, 32]" in text
    assert not (tmp_path / "ours").exists()


def test_layers_that_the_configuration_does_not_have(folder, tmp_path):
    changed(folder, num_hidden_layers=2)
    assert "that no layer takes" in refused("E613", lambda: import_hf(folder, weights=tmp_path / "ours"))


def test_damaged_files(folder, tmp_path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in whole[: len(whole) // 2], b"", b"\xff" * 64, struct.pack("<Q", 2**62) + b"{}":
        file.write_bytes(damaged)
        refused("E613", lambda: import_hf(folder, weights=tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_files_that_an_index_names(folder, tmp_path):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert "lacks files" in refused("E613", lambda: import_hf(folder, weights=tmp_path / "ours"))
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "no `weight_map`" in refused("E613", lambda: import_hf(folder, weights=tmp_path / "ours"))


def test_no_code_runs_out_of_a_pickled_file(folder, tmp_path):
    class Sly:
        def __reduce__(self):
            return (tmp_path / "touched").touch, ()

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Sly()}))
    refused("E613", lambda: import_hf(folder, weights=tmp_path / "ours"))
    assert not (tmp_path / "touched").exists()


def test_tied_heads_that_were_saved(tmp_path):
    """The same table again is left out; another one is not."""
    folder = hf_tiny.saved("mamba", tmp_path / "theirs")
    rewritten(folder, lambda w: w.update({"lm_head.weight": w["backbone.embeddings.weight"].clone()}))
    assert import_hf(folder, weights=tmp_path / "ours").skipped == ("lm_head.weight",)
    rewritten(folder, lambda w: w["lm_head.weight"].add_(1))
    assert "lm_head" in refused("E613", lambda: import_hf(folder, weights=tmp_path / "ours"))


def test_models_that_no_family_has():
    program = mambadsl.load(text="""
    model odd { vocab = 97  d_model = 64 }
    layer M = mamba2(heads=8, head_dim=16, d_state=16, groups=2)
    layer C = short_conv(d_conv=3)
    layer F = mlp(d_ff=64, gated=true)
    stack { M F C F M F }
    """)
    text = refused("E614", lambda: export_settings(program.layers))
    assert "does not fit any family" in text and "stack.2: `short_conv` as it is here" in text
    text = refused("E614", lambda: export_settings(program.layers, family="jamba"))
    assert "does not fit the family `jamba`" in text and "stack.0: `mamba2`" in text
    assert "did you mean `jamba`" in refused("E614", lambda: export_settings(program.layers, family="jambo"))


@pytest.mark.parametrize("change, says", [
    ({"A.window": 16}, "`window` is 16 here, none there"),
    ({"F.act": "relu2"}, "relu2"),
    ({"M.dt_max": 0.5}, ""),
    ({"logits_softcap": 30}, "`logits_softcap` is 30 here"),
])
def test_layers_that_a_family_has_otherwise(change, says):
    """What changes no result is no hindrance."""
    graph = mambadsl.load("models/bamba_9b.mdl", set=change).layers
    if "F.act" in change or not says:
        export_settings(graph, family="bamba")
    else:
        assert says in refused("E614", lambda: export_settings(graph, family="bamba"))


def test_shared_weights_stand_in_the_way():
    program = mambadsl.load(text="""
    model twice { vocab = 97  d_model = 64 }
    shared M = mamba2(heads=8, head_dim=16, d_state=16, groups=2)
    stack { M M }
    """)
    assert "weights that other layers use too" in refused("E614", lambda: export_settings(program.layers))


def test_weights_of_another_model(folder, tmp_path):
    import_hf(folder, weights=tmp_path / "ours")
    other = import_hf(hf_tiny.saved("jamba", tmp_path / "jamba"))
    assert "do not fit the model" in refused(
        "E613", lambda: export_hf(other.program, tmp_path / "again", weights=tmp_path / "ours", family="jamba")
    )
    assert not (tmp_path / "again").exists()


def test_verified_against_another_model(folder):
    program = mambadsl.load("models/bamba_9b.mdl")
    assert "is not the model in" in refused("E614", lambda: verify_hf(program, folder))


def test_the_first_layer_that_differs(folder, tmp_path):
    """A weight changed in the middle: every layer before it is the same."""
    found = import_hf(folder, weights=tmp_path / "ours")
    file = tmp_path / "ours/weights.safetensors"
    weights = load_file(file)
    weights["stack.3.mixer.down_proj.weight"][0, 0] += 1
    save_file(weights, file)
    done = verify_hf(found.program, folder, weights=tmp_path / "ours")
    assert not done.same and done.first.at == "stack.3" and done.first.theirs == "model.layers.1"
    assert [row.same for row in done.rows] == [True, False, False, False]
