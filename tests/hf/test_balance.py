"""The loss that balances experts, there and back: what transformers adds to its loss, and what a layer of ours adds."""

from __future__ import annotations

import json

import hf_tiny
import pytest
import torch
import torch.nn.functional as F

import mambadsl
from mambadsl.build.checkpoint import load_weights
from mambadsl.hf import balance
from mambadsl.hf.config import from_dict
from mambadsl.hf.exporter import export_settings
from mambadsl.hf.folder import export_hf, import_hf
from mambadsl.hf.importer import import_settings
from mambadsl.kinds.balance import Balanced
from mambadsl.text.diagnostic import MdlError

transformers = pytest.importorskip("transformers")

ON = {"output_router_logits": True, "router_aux_loss_coef": 0.03}
#: Configurations with one layer of experts.
ONE = {
    "jamba": dict(num_hidden_layers=2, attn_layer_period=3),
    "granitemoehybrid": dict(num_hidden_layers=1, layer_types=["full_attention"]),
    "qwen3_next": dict(mlp_only_layers=[0, 1, 2]),
    "qwen3_5_moe": dict(num_hidden_layers=1, layer_types=["full_attention"]),
    "minimax": dict(num_hidden_layers=1, layer_types=["full_attention"]),
}
TOKENS = torch.randint(3, 97, (1, 21), generator=torch.Generator().manual_seed(1))


def imported(name, **more):
    return import_settings(from_dict({**hf_tiny.config(name).to_dict(), **more}), name="them")


def layers(graph):
    return [mixer.fields for node in graph.layers for mixer in node.layer.branches if "aux_loss" in mixer.fields]


@pytest.mark.parametrize("name", hf_tiny.CONFIGS)
def test_what_has_the_setting_adds_the_loss(name):
    """transformers' own word: its loss is another one where the class knows the coefficient, and only there."""
    graph = imported(name, **ON).graph
    if not layers(graph):
        return
    model, how = hf_tiny.model(name), dict(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    with torch.no_grad():
        plain, added = (model(**how, output_router_logits=on).loss for on in (False, True))
    assert balance.knows(model.config) == bool(added != plain) == all(f.aux_loss for f in layers(graph))
    assert not any(f.aux_loss for f in layers(imported(name).graph))


@pytest.mark.parametrize("name", ONE)
def test_the_same_loss_of_one_layer_and_row(name, tmp_path):
    given = hf_tiny.CONFIGS[name][1] | ONE[name] | ON
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(hf_tiny.CONFIGS[name][0], **given), dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    found = import_hf(tmp_path / "theirs", weights=tmp_path / "ours")
    [fields] = layers(found.program.layers)
    assert fields.aux_loss == pytest.approx(0.03 * fields.top_k)
    ours = load_weights(found.program.build(), tmp_path / "ours")
    [layer] = [module for module in ours.modules() if isinstance(module, Balanced)]
    layer.watch(row_share=1, device=torch.device("cpu"))

    theirs(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    F.cross_entropy(ours(TOKENS)[0, :-1], TOKENS[0, 1:]).backward()
    [router] = [p.grad for path, p in theirs.named_parameters() if p.shape == layer.router.weight.shape and "e" in path
                and path.endswith(("gate.weight", "router.weight"))]
    torch.testing.assert_close(layer.router.weight.grad, router, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["jamba", "qwen3_next", "minimax"])
def test_there_and_back(name):
    found = imported(name, **ON)
    settings, again = export_settings(found.graph, family=hf_tiny.CONFIGS[name][0])
    assert {key: getattr(settings.config, key) for key in ON} == ON
    assert layers(again.graph) == layers(found.graph)
    again = mambadsl.load(text=mambadsl.compile.program_from_graph(found.graph).write())
    assert layers(again.layers) == layers(found.graph)


def test_another_coefficient_is_exported_over_what_was_kept(tmp_path):
    theirs = hf_tiny.saved("jamba", tmp_path / "theirs")
    found = import_hf(theirs, weights=tmp_path / "ours")
    (tmp_path / "model.mdl").write_text(found.text())
    program = mambadsl.load(tmp_path / "model.mdl", set={"E.aux_loss": "0.02"})
    assert not export_hf(program, tmp_path / "again", weights=tmp_path / "ours").unchanged
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "again"))
    assert {key for key, value in before.items() if after[key] != value} == set(ON)
    assert after["output_router_logits"] and after["router_aux_loss_coef"] == 0.02


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
def test_no_coefficient(wrong):
    with pytest.raises(MdlError, match="`router_aux_loss_coef` is .*; numbers from 0 have a counterpart"):
        imported("jamba", output_router_logits=True, router_aux_loss_coef=wrong)
