"""Folders of Hugging Face's in and out, for every family: the same logits, the same bits, the same configuration."""

from __future__ import annotations

import json
from pathlib import Path

import hf_tiny
import pytest
import torch

import mambadsl
from mambadsl.adapt.same import differences
from mambadsl.build.checkpoint import load_weights
from mambadsl.hf.config import from_dict
from mambadsl.hf.exporter import export_settings
from mambadsl.hf.family import names
from mambadsl.hf.folder import export_hf, import_hf
from mambadsl.hf.importer import import_settings
from mambadsl.hf.verify import verify_hf

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

LIMIT = 5e-5
#: Rounding grows with delta rules.
DELTA_LIMIT = 1e-4


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def test_every_family_is_here():
    """mamba_ssm's own checkpoints have tests of their own."""
    assert {model_type for model_type, _ in hf_tiny.CONFIGS.values()} == set(names()) - {"mamba_ssm"}


@pytest.mark.parametrize("name", hf_tiny.CONFIGS)
def test_there_and_back(name, tmp_path):
    theirs = hf_tiny.saved(name, tmp_path / "theirs")
    found = import_hf(theirs, weights=tmp_path / "ours")
    assert not found.imported.diagnostics
    # What follows from MiniMax's slopes is made again.
    assert all(path.endswith("_decay") for path in found.skipped)

    file = tmp_path / "model.mdl"
    file.write_text(found.text())
    program = mambadsl.load(file)
    assert program.layers == found.program.layers

    verified = verify_hf(program, theirs, weights=tmp_path / "ours", length=21)
    assert verified.same and len(verified.rows) > 1 and not verified.random

    done = export_hf(program, tmp_path / "again", weights=tmp_path / "ours")
    assert done.unchanged and done.family == hf_tiny.CONFIGS[name][0]
    assert_same_bits(tensors(tmp_path / "again"), tensors(theirs))
    assert (tmp_path / "again/config.json").read_text() == (theirs / "config.json").read_text()


@pytest.mark.parametrize("name", hf_tiny.CONFIGS)
def test_exported_without_what_was_kept(name, tmp_path):
    """From the model file alone: another way to say the same, and transformers computes the same with it."""
    theirs = hf_tiny.saved(name, tmp_path / "theirs")
    found = import_hf(theirs, weights=tmp_path / "ours")
    for kept in (tmp_path / "ours/hugging_face").iterdir():
        kept.unlink()
    family = hf_tiny.CONFIGS[name][0]
    done = export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours", family=family)
    assert not done.unchanged
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert type(again) is type(hf_tiny.model(name))
    tokens = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = hf_tiny.model(name)(input_ids=tokens, use_cache=False).logits
        logits = again.eval()(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", hf_tiny.CONFIGS)
def test_logits_by_the_protocol(name, tmp_path):
    """float32, one full forward pass, explicit positions: at most 5e-5 apart."""
    theirs = hf_tiny.saved(name, tmp_path)
    found = import_hf(theirs, weights=tmp_path / "ours")
    ours = load_weights(found.program.build(), tmp_path / "ours").eval()
    model = hf_tiny.model(name)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(getattr(model.config, "time_step_limit", (0, float("inf"))))
    tokens = torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    positions = {} if hasattr(model, "backbone") else dict(position_ids=torch.arange(21).expand(2, -1))
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False, **positions).logits.float()
        logits = ours(tokens)
    assert wanted.std() > 0.1
    kinds = {b.kind for node in found.program.layers.layers for b in node.layer.branches}
    limit = DELTA_LIMIT if kinds & {"gated_delta_net", "kimi_delta"} else LIMIT
    torch.testing.assert_close(logits, wanted, atol=limit, rtol=0)


@pytest.mark.parametrize("name", hf_tiny.CONFIGS)
def test_decoding_and_chunks_are_the_whole(name, tmp_path):
    """Token by token after a prompt of 9, and in chunks, against our own full forward pass."""
    found = import_hf(hf_tiny.saved(name, tmp_path), weights=tmp_path / "ours")
    ours = load_weights(found.program.build(), tmp_path / "ours").eval()
    tokens = torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = ours(tokens)
        for cuts in [9] + [1] * 12, [9, 12], [1, 7, 13]:
            state = ours.init_state(2)
            parts = [ours(chunk, state=state) for chunk in tokens.split(cuts, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


def test_shard_by_shard(tmp_path):
    """Weights of ours come from both sides of their files' borders, and are written as files of no more than theirs."""
    theirs = hf_tiny.saved("qwen3_next", tmp_path / "theirs", max_shard_size="60KB")
    assert len(list(theirs.glob("*.safetensors"))) > 4
    found = import_hf(theirs, weights=tmp_path / "ours")
    largest = max(file.stat().st_size for file in theirs.glob("*.safetensors"))
    assert all(file.stat().st_size < 1.2 * largest for file in found.files)
    assert len(found.files) > 3
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert_same_bits(tensors(tmp_path / "again"), tensors(theirs))
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(theirs))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_narrow_weights_stay_narrow(tmp_path):
    import copy

    narrow = copy.deepcopy(hf_tiny.model("bamba")).to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "theirs")
    found = import_hf(tmp_path / "theirs", weights=tmp_path / "ours")
    assert {t.dtype for t in tensors(tmp_path / "ours").values()} == {torch.bfloat16}
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert_same_bits(tensors(tmp_path / "again"), tensors(tmp_path / "theirs"))


def test_a_pickled_checkpoint(tmp_path):
    """pytorch_model.bin, loaded as weights only."""
    theirs = hf_tiny.saved("mamba", tmp_path / "theirs")
    weights = tensors(theirs)
    torch.save(weights, theirs / "pytorch_model.bin")
    (theirs / "model.safetensors").unlink()
    found = import_hf(theirs, weights=tmp_path / "ours")
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert_same_bits(tensors(tmp_path / "again"), weights)


def test_what_goes_along(tmp_path):
    theirs = hf_tiny.saved("mamba", tmp_path / "theirs")
    (theirs / "tokenizer.json").write_text("{}")
    (theirs / "README.md").write_text("a card")
    found = import_hf(theirs, weights=tmp_path / "ours")
    assert (tmp_path / "ours/hugging_face/tokenizer.json").exists()
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert (tmp_path / "again/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "again/README.md").exists()


def test_settings_beside_the_model_survive_a_change(tmp_path):
    """A file with another window: its own settings are written, the other ones stay."""
    theirs = hf_tiny.saved("recurrent_gemma", tmp_path / "theirs")
    found = import_hf(theirs, weights=tmp_path / "ours")
    file = tmp_path / "model.mdl"
    file.write_text(found.text())
    program = mambadsl.load(file, set={"A.window": 5})
    done = export_hf(program, tmp_path / "again", weights=tmp_path / "ours")
    assert not done.unchanged
    config = json.loads((tmp_path / "again/config.json").read_text())
    before = json.loads((theirs / "config.json").read_text())
    assert config["attention_window_size"] == 5 and before["attention_window_size"] == 8
    assert config["eos_token_id"] == before["eos_token_id"]
    assert verify_hf(program, tmp_path / "again").same


def test_exports_are_found_by_themselves():
    """Without a family: one that fits, and importing what it says gives the same model."""
    for name in hf_tiny.CONFIGS:
        graph = import_settings(from_dict(hf_tiny.config(name).to_dict()), name="them").graph
        _, found = export_settings(graph)
        assert not list(differences(graph, found.graph))


def test_slopes_that_a_folder_does_not_have(tmp_path):
    """The authors' own checkpoints: slopes follow from how deep a layer stands."""
    theirs = hf_tiny.saved("minimax", tmp_path / "theirs")
    file = theirs / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if not k.endswith(("slope_rate", "_decay"))}, file)
    found = import_hf(theirs, weights=tmp_path / "ours")
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    again = tensors(tmp_path / "again")
    assert again.keys() == whole.keys()
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-5)


def test_verifying_does_not_halve_the_stream(tmp_path):
    """RWKV's class does, every so many layers, which an eps in a norm can see."""
    import copy

    halving = copy.deepcopy(hf_tiny.model("rwkv"))
    halving.config.rescale_every = 2
    halving.save_pretrained(tmp_path / "theirs")
    found = import_hf(tmp_path / "theirs", weights=tmp_path / "ours")
    assert not found.imported.diagnostics
    verified = verify_hf(found.program, tmp_path / "theirs", weights=tmp_path / "ours")
    assert verified.first is None and verified.notes == ("rescale_every is 0 in theirs",)


def test_verifying_takes_biases_from_the_folder(tmp_path):
    """Zaya's class sets the bias of the choice of no expert to -1, whatever it loads."""
    theirs = hf_tiny.saved("zaya", tmp_path / "theirs")
    file = theirs / "model.safetensors"
    whole = load_file(file)
    for name in whole:
        if name.endswith("balancing_biases"):
            whole[name][-1] = 1
    save_file(whole, file, metadata={"format": "pt"})
    found = import_hf(theirs, weights=tmp_path / "ours")
    verified = verify_hf(found.program, theirs, weights=tmp_path / "ours")
    assert verified.first is None
    assert verified.notes == (
        "3 tensors like model.layers.0.mlp.gate.balancing_biases are the folder's, which loading changes",
    )


def test_the_page_names_every_family():
    page = (Path(__file__).parent.parent.parent / "docs/huggingface.md").read_text()
    assert all(f"`{name}`" in page for name in names())
    readme = (Path(__file__).parent.parent.parent / "README.md").read_text()
    assert f"({len(names())} families;" in readme


def test_the_text_model_of_a_larger_one(tmp_path):
    """Released Qwen3.5 checkpoints: settings in `text_config`, tensors in `model.language_model`, others around."""
    theirs = hf_tiny.saved("qwen3_5", tmp_path / "theirs")
    file, config = theirs / "model.safetensors", theirs / "config.json"
    whole = load_file(file)
    around = {"model.visual.patch_embed.weight": torch.zeros(3)}
    inside = {name.replace("model.", "model.language_model.", 1): t for name, t in whole.items()}
    save_file({**inside, **around}, file)
    text = json.loads(config.read_text())
    config.write_text(json.dumps({"model_type": "qwen3_5", "text_config": text, "vision_config": {}}))
    found = import_hf(theirs, weights=tmp_path / "ours")
    assert set(found.skipped) == set(around)
    assert "only the text model of the `qwen3_5`" in str(found.imported.diagnostics[0].message)
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert_same_bits(tensors(tmp_path / "again"), whole)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is type(hf_tiny.model("qwen3_5"))


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_next"])
def test_experts_in_one_tensor(name, tmp_path):
    """As transformers 5 holds them, and as some publish them."""
    theirs = hf_tiny.saved(name, tmp_path / "theirs")
    apart, packed = tensors(theirs), {}
    model = hf_tiny.model(name).state_dict()
    for path, tensor in model.items():
        below, _, leaf = path.rpartition(".experts.")
        if below and leaf in ("gate_up_proj", "down_proj"):
            packed[path] = tensor.to(next(iter(apart.values())).dtype).contiguous()
            apart = {k: v for k, v in apart.items() if not (k.startswith(f"{below}.experts.") and _is(k, leaf))}
    assert packed
    for file in theirs.glob("*.safetensors*"):
        file.unlink()
    save_file({**apart, **packed}, theirs / "model.safetensors", metadata={"format": "pt"})

    found = import_hf(theirs, weights=tmp_path / "ours")
    assert verify_hf(found.program, theirs, weights=tmp_path / "ours", length=21).same
    assert export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours").unchanged
    assert_same_bits(tensors(tmp_path / "again"), {**apart, **packed})


def _is(name, leaf):
    return name.endswith("down_proj.weight") == (leaf == "down_proj")
