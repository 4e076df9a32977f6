"""Checkpoints for tensor and pipeline ranks: the same bits there and back, and rows where Megatron's modules look for
them (recomputed here from heads, groups and ranks alone)."""

from __future__ import annotations

import pickle
from argparse import Namespace
from enum import Enum

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import mambadsl
from mambadsl import export_megatron, import_megatron
from mambadsl.adapt.same import differences
from mambadsl.graph.weights import all_weights
from mambadsl.text.diagnostic import MdlError

TEXT = """
model small {{ vocab = 64  d_model = 32  tie_embeddings = {tied} }}
layer M = mamba2(heads=8, head_dim=4, d_state=3, groups=4)
layer G = gated_delta_net(heads=8, key_heads=4, key_dim=3, value_dim=5, norm_eps=1e-5)
layer A = attention(heads=8, kv_heads=4, head_dim=6, rope=rope, out_gate=elementwise, qk_norm=per_head(eps=1e-5))
layer F = mlp(d_ff=24, gated=true)
layer E = moe(experts=3, top_k=2, d_ff=8, gated=true, router=sigmoid, shared_d_ff=12, latent=16, shared_gate=sigmoid)
layer L = mla(heads=8, nope_dim=4, rope_dim=2, value_dim=5, kv_rank=6, norm_eps=1e-5, rope=rope(pairs=interleaved))
layer Q = L(q_rank=9)
stack {{ {stack} }}
{more}
"""
MTP = "mtp(depths=2) { A E }"


def made(tmp_path, stack="M F A F G A E", *, tied="false", more=""):
    """(the program, its weights), and the weights in `ours`."""
    program = mambadsl.load(text=TEXT.format(stack=stack, tied=tied, more=more))
    generator = torch.Generator().manual_seed(0)
    weights = {
        path: torch.randn(weight.shape, generator=generator, dtype=torch.float32 if weight.fp32 else torch.bfloat16)
        for path, weight in all_weights(program.layers).items()
    }
    (tmp_path / "ours").mkdir()
    save_file(weights, tmp_path / "ours/weights.safetensors")
    return program, weights


def assert_back(program, weights, folder, tmp_path):
    found = import_megatron(folder, weights=tmp_path / "back", name="small")
    assert not [*differences(program.layers, found.program.layers)]
    assert [n.cut_after for n in found.program.layers.nodes] == [n.cut_after for n in program.layers.nodes]
    back = load_file(tmp_path / "back/weights.safetensors")
    assert back.keys() == weights.keys()
    for path, weight in weights.items():
        assert back[path].dtype == weight.dtype and torch.equal(back[path], weight), path
    return found


def rank(folder, name="mp_rank_00"):
    return torch.load(folder / "release" / name / "model_optim_rng.pt", weights_only=False)["model"]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("stack, how", [
    ("M F A F G A E", {}), ("M F A F G A E", {"tied": "true", "more": MTP}), ("L F L E", {}), ("Q F Q F", {}),
    ("| M F A F | G A E", {"more": MTP}), ("M F | A F | G A E |", {"tied": "true"}),
])
def test_there_and_back(tmp_path, stack, how, tp):
    program, weights = made(tmp_path, stack, **how)
    done = export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=tp)
    stages = stack.count("|") + 1
    assert len(done.files) == tp * stages + 2
    assert_back(program, weights, tmp_path / "theirs", tmp_path)
    assert (tmp_path / "theirs/arguments.txt").read_text() == done.text


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_of_mamba(tmp_path, tp):
    """Each rank: [z | x | B | C | dt] of its heads and groups."""
    program, weights = made(tmp_path, "M")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=tp)
    heads, dim, groups, states = 8, 4, 4, 3
    d_inner, bc = heads * dim, groups * states
    z, x, b, c, dt = range(0, 32), range(32, 64), range(64, 76), range(76, 88), range(88, 96)
    assert [len(r) for r in (z, x, b, c, dt)] == [d_inner, d_inner, bc, bc, heads]
    path, at = "stack.0.mixer.", "decoder.layers.0.mixer."
    for r in range(tp):
        theirs = rank(tmp_path / "theirs", f"mp_rank_{r:02d}")
        mine = [i for part in (z, x, b, c, dt) for i in part[len(part) // tp * r : len(part) // tp * (r + 1)]]
        assert torch.equal(theirs[at + "in_proj.weight"], weights[path + "in_proj.weight"][mine])
        mine = [i - d_inner for i in mine if d_inner <= i < d_inner + d_inner + 2 * bc]
        assert torch.equal(theirs[at + "conv1d_weight"], weights[path + "conv.weight"][mine][:, None])
        assert torch.equal(theirs[at + "conv1d_bias"], weights[path + "conv.bias"][mine])
        inner = slice(d_inner // tp * r, d_inner // tp * (r + 1))
        assert torch.equal(theirs[at + "out_proj.weight"], weights[path + "out_proj.weight"][:, inner])
        assert torch.equal(theirs[at + "norm.weight"], weights[path + "gate_norm.weight"][inner])
        for name in "A_log", "D", "dt_bias":
            assert torch.equal(theirs[at + name], weights[path + name][heads // tp * r : heads // tp * (r + 1)])
        assert torch.equal(theirs[at + "in_proj.layer_norm_weight"], weights["stack.0.norm.weight"])
        rows = slice(64 // tp * r, 64 // tp * (r + 1))
        assert torch.equal(theirs["embedding.word_embeddings.weight"], weights["embed.weight"][rows])
        assert torch.equal(theirs["output_layer.weight"], weights["head.weight"][rows])
        assert torch.equal(theirs["decoder.final_norm.weight"], weights["final_norm.weight"])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_of_attention(tmp_path, tp):
    """For each key/value head: two query heads, their gates, the key head, the value head."""
    program, weights = made(tmp_path, "A")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=tp)
    q, k, v, gate = weights["stack.0.mixer.qkv_proj.weight"].split([48, 24, 24, 48])
    q, k, v, gate = (t.unflatten(0, (-1, 6)) for t in (q, k, v, gate))
    wanted = [
        torch.cat([q[2 * g], q[2 * g + 1], gate[2 * g], gate[2 * g + 1], k[g], v[g]]) for g in range(4)
    ]
    for r in range(tp):
        theirs = rank(tmp_path / "theirs", f"mp_rank_{r:02d}")
        mine = torch.cat(wanted[4 // tp * r : 4 // tp * (r + 1)])
        assert torch.equal(theirs["decoder.layers.0.self_attention.linear_qkv.weight"], mine)
        assert torch.equal(
            theirs["decoder.layers.0.self_attention.linear_proj.weight"],
            weights["stack.0.mixer.o_proj.weight"][:, 48 // tp * r : 48 // tp * (r + 1)],
        )
        assert torch.equal(
            theirs["decoder.layers.0.self_attention.q_layernorm.weight"], weights["stack.0.mixer.q_norm.weight"]
        )


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_of_feed_forward_layers(tmp_path, tp):
    """Each rank has its share of the gates, and then of what they gate."""
    program, weights = made(tmp_path, "F E")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=tp)

    def halves(tensor, r):
        n = len(tensor) // 2 // tp
        return torch.cat([part[n * r : n * (r + 1)] for part in tensor.chunk(2)])

    for r in range(tp):
        theirs = rank(tmp_path / "theirs", f"mp_rank_{r:02d}")
        at, path = "decoder.layers.0.mlp.", "stack.0.mixer."
        assert torch.equal(theirs[at + "linear_fc1.weight"], halves(weights[path + "gate_up_proj.weight"], r))
        columns = slice(24 // tp * r, 24 // tp * (r + 1))
        assert torch.equal(theirs[at + "linear_fc2.weight"], weights[path + "down_proj.weight"][:, columns])
        at, path = "decoder.layers.1.mlp.", "stack.1.mixer."
        for i in range(3):
            assert torch.equal(
                theirs[f"{at}experts.linear_fc1.weight{i}"], halves(weights[path + "experts.gate_up_proj"][i], r)
            )
            columns = slice(8 // tp * r, 8 // tp * (r + 1))
            assert torch.equal(
                theirs[f"{at}experts.linear_fc2.weight{i}"], weights[path + "experts.down_proj"][i][:, columns]
            )
        for name, ours in {
            "router.weight": "router.weight", "router.expert_bias": "router.bias",
            "fc1_latent_proj.weight": "latent_in_proj.weight", "fc2_latent_proj.weight": "latent_out_proj.weight",
            "shared_experts.gate_weight": "shared_gate.weight",
        }.items():
            assert torch.equal(theirs[at + name], weights[path + ours])
        assert torch.equal(
            theirs[at + "shared_experts.linear_fc1.weight"], halves(weights[path + "shared.gate_up_proj.weight"], r)
        )
        assert torch.equal(theirs["decoder.layers.1.pre_mlp_layernorm.weight"], weights["stack.1.norm.weight"])


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_of_delta_and_latent_layers(tmp_path, tp):
    program, weights = made(tmp_path, "G Q")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=tp)
    parts = weights["stack.0.mixer.in_proj.weight"].split([12, 12, 40, 40, 8, 8])
    latent = weights["stack.1.mixer.in_proj.weight"]
    k, v = weights["stack.1.mixer.kv_proj.weight"].split([32, 40])
    mixed = torch.cat([torch.cat([k[4 * h : 4 * h + 4], v[5 * h : 5 * h + 5]]) for h in range(8)])
    for r in range(tp):
        theirs = rank(tmp_path / "theirs", f"mp_rank_{r:02d}")
        at = "decoder.layers.0.self_attention."
        assert torch.equal(theirs[at + "in_proj.weight"], torch.cat([part.chunk(tp)[r] for part in parts]))
        assert torch.equal(theirs[at + "out_norm.weight"], weights["stack.0.mixer.gate_norm.weight"])
        conv = weights["stack.0.mixer.conv.weight"].split([12, 12, 40])
        assert torch.equal(theirs[at + "conv1d.weight"], torch.cat([part.chunk(tp)[r] for part in conv])[:, None])
        at = "decoder.layers.1.self_attention."
        assert torch.equal(theirs[at + "linear_q_down_proj.weight"], latent[:9])
        assert torch.equal(theirs[at + "linear_kv_down_proj.weight"], latent[9:])
        assert torch.equal(theirs[at + "linear_q_up_proj.weight"], weights["stack.1.mixer.q_proj.weight"].chunk(tp)[r])
        assert torch.equal(theirs[at + "linear_kv_up_proj.weight"], mixed.chunk(tp)[r])
        norm = weights["stack.1.mixer.latent_norm.weight"]
        assert torch.equal(theirs[at + "linear_kv_up_proj.layer_norm_weight"], norm)
        assert torch.equal(theirs["decoder.layers.1.input_layernorm.weight"], weights["stack.1.norm.weight"])


def test_pipeline_ranks_number_their_own_layers(tmp_path):
    program, weights = made(tmp_path, "M F | A F | G A E", tied="true", more=MTP)
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=2)
    first, middle, last = (rank(tmp_path / "theirs", f"mp_rank_01_{i:03d}") for i in range(3))
    assert "embedding.word_embeddings.weight" in first and "decoder.final_norm.weight" not in first
    assert {name.split(".")[2] for name in middle} == {"0", "1"}
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in middle
    # The last stage has the table again, as the head and for what predicts further tokens.
    table = weights["embed.weight"].chunk(2)[1]
    assert torch.equal(last["output_layer.weight"], table)
    assert torch.equal(last["embedding.word_embeddings.weight"], table)
    assert torch.equal(last["mtp.layers.1.eh_proj.weight"], weights["mtp.1.eh_proj.weight"].chunk(2)[1])
    assert "mtp.layers.0.mtp_model_layer.layers.1.pre_mlp_layernorm.weight" in last
    assert "mtp.layers.0.final_layernorm.weight" in last


def rewritten(folder, change, name="mp_rank_00"):
    file = folder / "release" / name / "model_optim_rng.pt"
    whole = torch.load(file, weights_only=False)
    change(whole)
    torch.save(whole, file)


class Backend(Enum):
    """As arguments of Megatron's have them: classes of its own."""

    flash = 1


def test_other_things_in_a_checkpoint(tmp_path):
    """State of random numbers, of FP8, and objects of Megatron's: left alone."""
    program, weights = made(tmp_path, "M F E")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours")

    def change(whole):
        whole["args"] = Namespace(**vars(whole["args"]), attention_backend=Backend.flash, params_dtype=torch.bfloat16)
        whole["rng_state"] = [{"np_rng_state": numpy.random.get_state()}]
        whole["model"]["decoder.layers.0.mixer.in_proj._extra_state"] = torch.zeros(3)
        whole["model"]["decoder.layers.2.mlp.router.local_tokens_per_expert"] = torch.zeros(3)

    rewritten(tmp_path / "theirs", change)
    found = assert_back(program, weights, tmp_path / "theirs", tmp_path)
    assert len(found.skipped) == 2


def test_no_code_of_a_checkpoint_runs(tmp_path):
    program, _ = made(tmp_path, "M F")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours")

    class Sly:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'touched')!r}, 'w')",)

    rewritten(tmp_path / "theirs", lambda whole: whole.update(more=Sly()))
    import_megatron(tmp_path / "theirs", weights=tmp_path / "back")
    assert not (tmp_path / "touched").exists()


def test_names_of_other_versions(tmp_path):
    program, weights = made(tmp_path, "M E")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours")

    def change(whole):
        model = whole["model"]
        for w in "weight", "bias":
            model[f"decoder.layers.0.mixer.conv1d.{w}"] = model.pop(f"decoder.layers.0.mixer.conv1d_{w}")
        for i in range(3):
            for fc in "linear_fc1", "linear_fc2":
                old = f"decoder.layers.1.mlp.experts.local_experts.{i}.{fc}.weight"
                model[old] = model.pop(f"decoder.layers.1.mlp.experts.{fc}.weight{i}")

    rewritten(tmp_path / "theirs", change)
    assert_back(program, weights, tmp_path / "theirs", tmp_path)


def test_virtual_stages(tmp_path):
    """Two ranks with two segments each: dealt out in turn."""
    program, weights = made(tmp_path, "M F | A F | G A | E")
    export_megatron(program, tmp_path / "four", weights=tmp_path / "ours")
    for r in range(2):
        at = tmp_path / f"two/iter_0000007/mp_rank_00_{r:03d}"
        at.mkdir(parents=True)
        whole = {f"model{v}": rank(tmp_path / "four", f"mp_rank_00_{2 * v + r:03d}") for v in range(2)}
        args = torch.load(tmp_path / "four/release/mp_rank_00_000/model_optim_rng.pt", weights_only=False)["args"]
        args.pipeline_model_parallel_size = 2
        torch.save({"args": args, **whole}, at / "model_optim_rng.pt")
    (tmp_path / "two/latest_checkpointed_iteration.txt").write_text("7")
    assert_back(program, weights, tmp_path / "two", tmp_path)


def refused(do):
    with pytest.raises(MdlError) as caught:
        do()
    assert {d.code.id for d in caught.value.diagnostics} == {"E613"}
    return str(caught.value)


def test_tensors_that_do_not_fit(tmp_path):
    program, _ = made(tmp_path, "M F")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=2)

    def change(whole):
        whole["model"]["decoder.layers.0.mixer.ALog"] = whole["model"].pop("decoder.layers.0.mixer.A_log")
        whole["model"]["decoder.layers.0.mixer.D"] = torch.zeros(5)

    for r in range(2):
        rewritten(tmp_path / "theirs", change, f"mp_rank_{r:02d}")
    text = refused(lambda: import_megatron(tmp_path / "theirs", weights=tmp_path / "back"))
    assert "missing: `decoder.layers.0.mixer.A_log`, nearest: `decoder.layers.0.mixer.ALog`" in text
    assert "shape of `decoder.layers.0.mixer.D`: [5] there, [4] by the arguments" in text
    assert not (tmp_path / "back").exists()


def test_ranks_that_differ(tmp_path):
    program, _ = made(tmp_path, "M F")
    export_megatron(program, tmp_path / "theirs", weights=tmp_path / "ours", tp=2)
    rewritten(tmp_path / "theirs", lambda w: w["model"]["decoder.final_norm.weight"].add_(1), "mp_rank_01")
    text = refused(lambda: import_megatron(tmp_path / "theirs", weights=tmp_path / "back"))
    assert "`decoder.final_norm.weight` is not the same on all tensor ranks" in text
    (tmp_path / "theirs/release/mp_rank_01/model_optim_rng.pt").unlink()
    refused(lambda: import_megatron(tmp_path / "theirs", weights=tmp_path / "back"))


def test_no_checkpoint(tmp_path):
    assert "no mp_rank_*" in refused(lambda: import_megatron(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    assert "which is not there" in refused(lambda: import_megatron(tmp_path))
    (tmp_path / "release/mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    for damaged in b"", b"PK" + b"\0" * 90, pickle.dumps([1, 2]):
        (tmp_path / "release/mp_rank_00/model_optim_rng.pt").write_bytes(damaged)
        refused(lambda: import_megatron(tmp_path))
