"""mamba_ssm's own checkpoints: their names and options, held to Hugging Face's classes, which have the same layers."""

from __future__ import annotations

import json

import hf_tiny
import pytest
import torch
import torch.nn.functional as F

from mambadsl.build.checkpoint import load_weights
from mambadsl.hf.folder import export_hf, import_hf
from mambadsl.text.diagnostic import MdlError

pytest.importorskip("transformers")

#: Their options for the tiny models.
OPTIONS = {
    "mamba": dict(ssm_cfg=dict(d_state=8)),
    "mamba2": dict(
        ssm_cfg=dict(layer="Mamba2", d_state=16, headdim=8, ngroups=4, chunk_size=8, bias=True), tie_embeddings=False,
    ),
    "mamba2 limits": dict(
        ssm_cfg=dict(layer="Mamba2", d_state=16, headdim=8, ngroups=2, chunk_size=8, dt_limit=[0.5, 1.0])
    ),
}


def written(folder, weights, **options):
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    config = dict(d_model=32, n_layer=2, vocab_size=97, pad_vocab_size_multiple=1, **options)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_as_hugging_face_s_class(name, tmp_path):
    model = hf_tiny.model(name)
    weights = {k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()}
    folder = written(tmp_path / "theirs", weights, **OPTIONS[name])
    found = import_hf(folder, weights=tmp_path / "ours")
    assert not found.imported.diagnostics
    assert set(found.skipped) <= {"lm_head.weight"}
    ours = load_weights(found.program.build(), tmp_path / "ours").eval()
    tokens = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(input_ids=tokens).logits, atol=5e-5, rtol=0)
    done = export_hf(found.program, tmp_path / "again", weights=tmp_path / "ours")
    assert done.family == hf_tiny.CONFIGS[name][0] and not done.unchanged


def test_attention_and_mlps(tmp_path):
    """Layers of the 2.7 B hybrid's form: the value of an MLP comes before its gate."""
    g = torch.Generator().manual_seed(0)

    def weight(*shape):
        return torch.randn(shape, generator=g) * shape[-1] ** -0.5

    at, hidden = "backbone.layers", 128
    weights = {"backbone.embedding.weight": weight(104, 32), "backbone.norm_f.weight": torch.ones(32)}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    weights |= {
        f"{at}.0.norm.weight": torch.ones(32), f"{at}.0.norm2.weight": torch.ones(32),
        f"{at}.0.mixer.in_proj.weight": weight(64, 32), f"{at}.0.mixer.out_proj.weight": weight(32, 32),
        f"{at}.0.mlp.fc1.weight": weight(2 * hidden, 32), f"{at}.0.mlp.fc2.weight": weight(32, hidden),
    }
    folder = written(
        tmp_path / "theirs", weights, d_intermediate=100, attn_layer_idx=[0], ssm_cfg=dict(layer="Mamba2"),
        attn_cfg=dict(
            num_heads=4, num_heads_kv=2, head_dim=8, rotary_emb_dim=4, causal=True, qkv_proj_bias=False,
            out_proj_bias=False,
        ),
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 1, "pad_vocab_size_multiple": 8}))
    found = import_hf(folder, weights=tmp_path / "ours")
    [attention, mlp] = found.program.layers.layers
    f = attention.layer.branches[0].fields
    assert (f.heads, f.kv_heads, f.head_dim, f.rope.fraction) == (4, 2, 8, 0.5)
    assert mlp.layer.branches[0].fields.d_ff == hidden and found.program.layers.model.vocab == 104
    model = load_weights(found.program.build(), tmp_path / "ours").eval()
    x = torch.randn(1, 3, 32, generator=g)
    value, gate = F.linear(x, weights[f"{at}.0.mlp.fc1.weight"]).chunk(2, -1)
    wanted = F.linear(value * F.silu(gate), weights[f"{at}.0.mlp.fc2.weight"])
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule("stack.1.mixer")(x, None), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options, says", [
    (dict(ssm_cfg=dict(layer="Mamba2", D_has_hdim=True)), "has `D_has_hdim` of `True`; only `False`"),
    (dict(ssm_cfg=dict(layer="Mamba2", d_ssm=8)), "has `d_ssm` of 8; only all 64"),
    (dict(ssm_cfg=dict(d_stat=8)), "has `d_stat` of `8`, which has no counterpart"),
    (dict(ssm_cfg={}, attn_layer_idx=[1], attn_cfg=dict(num_heads=4, d_conv=4)), "has `d_conv` of `4`; only `0`"),
])
def test_options_without_a_counterpart(options, says, tmp_path):
    folder = written(tmp_path / "theirs", {}, **options)
    with pytest.raises(MdlError) as caught:
        import_hf(folder)
    assert says in str(caught.value) and "config.json:1:" in str(caught.value)
