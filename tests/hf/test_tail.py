"""Multi-token prediction: the tail's tensors in and out, bit for bit, and what it computes against transformers."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import hf_tiny
import pytest
import torch

import mambadsl
from mambadsl.adapt.same import differences
from mambadsl.build.checkpoint import load_weights
from mambadsl.hf.config import from_dict
from mambadsl.hf.exporter import export_settings
from mambadsl.hf.folder import export_hf, import_hf
from mambadsl.hf.verify import verify_hf
from mambadsl.text.diagnostic import MdlError

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

LIMIT = 1e-4
QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden", "eh_proj": "mtp.fc",
    "final_norm": "mtp.norm",
}
LING = {name: f"model.layers.4.{name}" for name in ("enorm", "hnorm", "eh_proj")}
NEMOTRON = {name: f"mtp.layers.0.{name}" for name in ("enorm", "hnorm", "eh_proj")}

#: name: (the tiny model, settings that say that there is a tail, ours -> the tensors of its ends, blocks of the model
#: -> where those of the tail lie, the tail).
TAILS = {
    "qwen3_next": ("qwen3_next", {}, QWEN, {"model.layers.3": "mtp.layers.0"}, "A E"),
    "qwen3_next says so": (
        "qwen3_next yarn", {"num_nextn_predict_layers": 1}, QWEN, {"model.layers.3": "mtp.layers.0"}, "A E",
    ),
    "qwen3_5": ("qwen3_5", {"mtp_num_hidden_layers": 1}, QWEN, {"model.layers.3": "mtp.layers.0"}, "A F"),
    "qwen3_5_moe": ("qwen3_5_moe", {"mtp_num_hidden_layers": 1}, QWEN, {"model.layers.3": "mtp.layers.0"}, "A E"),
    "nemotron_h": (
        "nemotron_h experts", {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
        {**NEMOTRON, "final_norm": "mtp.layers.1.final_layernorm"},
        {"backbone.layers.2": "mtp.layers.0", "backbone.layers.3": "mtp.layers.1"}, "A E",
    ),
    "nemotron_h another pattern": (
        "nemotron_h latent", {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["moe"]},
        {**NEMOTRON, "final_norm": "mtp.layers.0.final_layernorm"}, {"backbone.layers.3": "mtp.layers.0"}, "E",
    ),
    "bailing_hybrid": (
        "bailing_hybrid", {"num_nextn_predict_layers": 1}, {**LING, "final_norm": "model.layers.4.final_layernorm"},
        {"model.layers.3": "model.layers.4"}, "L E",
    ),
    "bailing_hybrid shared_head": (
        "bailing_hybrid", {"num_nextn_predict_layers": 1}, {**LING, "final_norm": "model.layers.4.shared_head.norm"},
        {"model.layers.3": "model.layers.4"}, "L E",
    ),
}


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def shaken(tensor, seed):
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return tensor + 0.3 * noise if tensor.dim() < 2 else noise * tensor.shape[-1] ** -0.5


def changed(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}, indent=2))
    return folder


def saved(name, folder, *, with_tensors=True):
    """The tiny model, with blocks that are copied from its own and shaken, and with ends."""
    tiny, settings, ends, blocks, _ = TAILS[name]
    changed(hf_tiny.saved(tiny, folder), **settings)
    if with_tensors:
        whole = load_file(folder / "model.safetensors")
        found = {
            at + path.removeprefix(block): shaken(tensor, len(path))
            for block, at in blocks.items() for path, tensor in whole.items() if path.startswith(f"{block}.")
        }
        d = whole[next(path for path in whole if "embed" in path)].shape[1]
        for i, (ours, path) in enumerate(ends.items()):
            found[f"{path}.weight"] = shaken(torch.zeros(d, 2 * d) if ours == "eh_proj" else torch.ones(d), 100 + i)
        assert not found.keys() & whole.keys()
        save_file({**whole, **found}, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}


@pytest.mark.parametrize("name", TAILS)
def test_there_and_back(name, tmp_path):
    theirs = saved(name, tmp_path / "theirs")
    found = import_hf(theirs, weights=tmp_path / "ours")
    assert not found.imported.diagnostics and not found.skipped
    assert f"mtp {{ {TAILS[name][-1]} }}" in found.text()
    file = tmp_path / "model.mdl"
    file.write_text(found.text())
    program = mambadsl.load(file)
    assert program.layers == found.program.layers
    assert verify_hf(program, theirs, weights=tmp_path / "ours", length=21).same
    done = export_hf(program, tmp_path / "again", weights=tmp_path / "ours")
    assert done.unchanged
    assert_same_bits(tensors(tmp_path / "again"), tensors(theirs))
    assert (tmp_path / "again/config.json").read_text() == (theirs / "config.json").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", TAILS)
def test_exported_without_what_was_kept(name, tmp_path):
    found = import_hf(saved(name, tmp_path / "theirs"), weights=tmp_path / "ours")
    for kept in (tmp_path / "ours/hugging_face").iterdir():
        kept.unlink()
    family = found.imported.family.model_type
    done = export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours", family=family)
    assert not done.unchanged
    again = import_hf(tmp_path / "again", weights=tmp_path / "twice")
    assert not list(differences(again.program.layers, found.program.layers))
    assert_same_bits(tensors(tmp_path / "twice"), tensors(tmp_path / "ours"))
    wanted = tensors(tmp_path / "theirs")
    if family == "bailing_hybrid":
        # As the tables have them; transformers saves all blocks' last projections under one name.
        for block in 0, 2:
            at = f"model.layers.{block}.attention"
            wanted[f"{at}.o_proj.weight"] = wanted.pop(f"{at}.dense.weight")
        last = next(path for path in wanted if path.endswith((".final_layernorm.weight", ".shared_head.norm.weight")))
        wanted["model.layers.4.final_layernorm.weight"] = wanted.pop(last)
    assert_same_bits(tensors(tmp_path / "again"), wanted)


def drafted(program, weights, tokens):
    ours = load_weights(program.build(), weights).eval()
    with torch.no_grad():
        return ours.drafts(tokens)[1:]


def ids(T=21):
    return torch.randint(3, 97, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [n for n in TAILS if "nemotron" not in n and n != "bailing_hybrid"])
def test_drafts_are_those_of_hugging_face(name, tmp_path):
    """As transformers loads and runs them. It knows one name of the last norm, and of a released number of layers."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    types = {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}
    if "bailing" in name:
        types = {"mtp_layer_types": ["full_attention"], "mtp_mlp_layer_types": ["sparse"]}
    theirs = changed(saved(name, tmp_path / "theirs"), **types)
    found = import_hf(theirs, weights=tmp_path / "ours")
    auto = transformers.AutoModelForCausalLM
    main = auto.from_pretrained(theirs, dtype=torch.float32, attn_implementation="eager").eval()
    main.set_experts_implementation("eager")
    if "bailing" in name:
        main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\..*"]
    tail = MtpModel.from_pretrained(main).eval()
    T, tokens = 21, ids()
    [draft] = drafted(found.program, tmp_path / "ours", tokens)
    positions = torch.arange(T).expand(2, -1)
    with torch.no_grad():
        given = main(input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True)
        cache = MtpCache(config=main.config.get_mtp_config())
        h = tail.forward_layer(0, given.hidden_states[-1][:, :-1], positions[:, 1:], cache, input_ids=tokens[:, 1:])
        wanted = main.lm_head(h)
    assert wanted.std() > 0.1
    torch.testing.assert_close(draft[:, :-1], wanted, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("name", [n for n in TAILS if "nemotron" in n])
def test_drafts_out_of_hugging_faces_blocks(name, tmp_path):
    """Of Nemotron transformers has the blocks, but nothing that runs them as a tail."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHRMSNorm

    theirs = saved(name, tmp_path / "theirs")
    found = import_hf(theirs, weights=tmp_path / "ours")
    weights = tensors(theirs)
    main = hf_tiny.model(TAILS[name][0])
    config = deepcopy(main.config)
    config.layers_block_type = json.loads((theirs / "config.json").read_text()).get("mtp_layers_block_type", [])
    if "another" not in name:
        config.layers_block_type = ["full_attention", "moe"]
    config._attn_implementation, config._experts_implementation = "eager", "eager"

    def norm(path):
        made = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        made.load_state_dict({"weight": weights[f"{path}.weight"]})
        return made

    blocks = []
    for i, source in enumerate(TAILS[name][3].values()):
        block = NemotronHBlock(config, layer_idx=i).eval()
        own = {k.removeprefix(f"{source}."): v for k, v in weights.items() if k.startswith(f"{source}.")}
        for ours in ("up_proj", "down_proj"):
            parts = {k: own.pop(k) for k in list(own) if f"experts.{ours}" not in k and ".experts." in k and ours in k}
            if parts:
                own[f"mixer.experts.{ours}"] = torch.stack(list(parts.values()))
        mixed = [k for k in own if k.startswith(("enorm", "hnorm", "eh_proj", "final_layernorm"))]
        block.load_state_dict({k: v for k, v in own.items() if k not in mixed})
        blocks.append(block)
    tokens = ids()
    [draft] = drafted(found.program, tmp_path / "ours", tokens)
    ends = TAILS[name][2]
    T = tokens.shape[1]
    mask = torch.full((T - 1, T - 1), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        h = main(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[-1][:, :-1]
        e = main.get_input_embeddings()(tokens[:, 1:])
        both = torch.cat([norm(ends["enorm"])(e), norm(ends["hnorm"])(h)], -1)
        x = both @ weights[f"{ends['eh_proj']}.weight"].T
        for block in blocks:
            x = block(x, attention_mask=mask)
            x = x[0] if isinstance(x, tuple) else x
        wanted = main.lm_head(norm(ends["final_norm"])(x))
    assert wanted.std() > 0.1
    torch.testing.assert_close(draft[:, :-1], wanted, atol=LIMIT, rtol=0)


def test_the_tail_of_a_larger_model(tmp_path):
    """Released Qwen3.5 checkpoints: the text model lies in `model.language_model`, its tail beside it."""
    theirs = saved("qwen3_5", tmp_path / "theirs")
    whole = load_file(theirs / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): t for name, t in whole.items()}
    save_file(inside, theirs / "model.safetensors")
    text = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    found = import_hf(theirs, weights=tmp_path / "ours")
    assert found.program.layers.mtp is not None and not found.skipped
    export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert_same_bits(tensors(tmp_path / "again"), whole)


def test_tails_that_are_named_but_not_there(tmp_path):
    """Said, left out, and the folder comes back as it was."""
    for name in "qwen3_5", "nemotron_h", "bailing_hybrid":
        theirs = saved(name, tmp_path / name, with_tensors=False)
        found = import_hf(theirs, weights=tmp_path / f"{name}_ours")
        [note] = found.imported.diagnostics
        assert note.code.id == "W615" and note.span is not None and "left out" in note.message
        assert found.program.layers.mtp is None
        done = export_hf(found.program, tmp_path / f"{name}_again", weights=tmp_path / f"{name}_ours")
        assert done.unchanged
        assert_same_bits(tensors(tmp_path / f"{name}_again"), tensors(theirs))
        # A configuration alone is taken at its word.
        (theirs / "model.safetensors").unlink()
        alone = import_hf(theirs)
        assert alone.program.layers.mtp is not None and not alone.imported.diagnostics


def test_tails_that_the_configuration_denies(tmp_path):
    theirs = changed(saved("nemotron_h", tmp_path / "nemotron"), num_nextn_predict_layers=0)
    found = import_hf(theirs, weights=tmp_path / "ours")
    assert found.program.layers.mtp is None
    assert found.skipped and all(name.startswith("mtp.") for name in found.skipped)
    theirs = changed(saved("bailing_hybrid", tmp_path / "ling"), num_nextn_predict_layers=0)
    with pytest.raises(MdlError, match="that no layer takes"):
        import_hf(theirs, weights=tmp_path / "ours2")


def test_tails_of_a_file_that_says_nothing(tmp_path):
    """The class's own number is nobody's word; the tensors are."""
    for with_tensors in True, False:
        theirs = saved("bailing_hybrid", tmp_path / str(with_tensors), with_tensors=with_tensors)
        config = json.loads((theirs / "config.json").read_text())
        del config["num_nextn_predict_layers"]
        (theirs / "config.json").write_text(json.dumps(config))
        found = import_hf(theirs, weights=tmp_path / f"{with_tensors}_ours")
        assert (found.program.layers.mtp is not None) == with_tensors and not found.imported.diagnostics


def test_tails_with_tensors_missing(tmp_path):
    theirs = saved("qwen3_5", tmp_path / "theirs")
    whole = load_file(theirs / "model.safetensors")
    del whole["mtp.norm.weight"], whole["mtp.layers.0.self_attn.q_proj.weight"]
    save_file(whole, theirs / "model.safetensors")
    with pytest.raises(MdlError) as caught:
        import_hf(theirs, weights=tmp_path / "ours")
    assert "missing: `mtp.norm.weight`" in str(caught.value) and "2 missing" in str(caught.value)


def test_tables_that_the_tail_repeats(tmp_path):
    """Copies of the embedding and the head are left out, other tensors are not."""
    theirs = saved("bailing_hybrid", tmp_path / "theirs")
    file = theirs / "model.safetensors"
    whole = load_file(file)
    copies = {
        "model.layers.4.shared_head.head.weight": whole["lm_head.weight"].clone(),
        "model.layers.4.embed_tokens.weight": whole["model.word_embeddings.weight"].clone(),
    }
    save_file({**whole, **copies}, file)
    found = import_hf(theirs, weights=tmp_path / "ours")
    assert set(found.skipped) == set(copies)
    copies["model.layers.4.shared_head.head.weight"] += 1
    save_file({**whole, **copies}, file)
    with pytest.raises(MdlError, match="that no layer takes"):
        import_hf(theirs, weights=tmp_path / "ours")


def test_depths_without_a_counterpart(tmp_path):
    theirs = changed(saved("qwen3_5", tmp_path / "theirs"), mtp_num_hidden_layers=2)
    with pytest.raises(MdlError, match="only 1 has a counterpart") as caught:
        import_hf(theirs)
    assert '"mtp_num_hidden_layers": 2' in str(caught.value)
    changed(theirs, mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=True)
    with pytest.raises(MdlError, match="mtp_use_dedicated_embeddings"):
        import_hf(theirs)
    other = changed(
        saved("bailing_hybrid", tmp_path / "ling"), num_nextn_predict_layers=2,
        mtp_layer_types=["full_attention", "linear_attention"],
    )
    with pytest.raises(MdlError, match="depths with different layers"):
        import_hf(other)


@pytest.mark.parametrize("name, depths", [("nemotron_h_another", 2), ("bailing_hybrid", 3), ("qwen3_next", 1)])
def test_several_depths_go_out_and_come_back(name, depths):
    """Settings alone."""
    tiny = {"nemotron_h_another": "nemotron_h latent"}.get(name, name)
    settings = from_dict(hf_tiny.config(tiny).to_dict())
    from mambadsl.hf.importer import import_settings

    plain = import_settings(settings, name="them", tail=False).graph
    text = mambadsl.load(text=_written(plain) + f"\nmtp(depths={depths}) {{ {'L' if 'bail' in name else 'A'} E }}\n")
    graph = text.layers
    exported, found = export_settings(graph, family=settings.config.model_type)
    assert not list(differences(graph, found.graph))
    back = import_settings(from_dict(exported.config.to_dict()), name="them")
    assert back.graph.mtp.settings.depths == depths
    assert len(back.places) == len(found.places)


def _written(graph):
    from mambadsl.graph.write import write

    return write(replace(graph, expects=())).split("expect layers")[0]
