"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: one mixer a layer, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import FP32_STREAM, act, dt_limit, norm, router
from mambadsl.hf.family import Both, Family, Layer, Recipe, Tail, fixed
from mambadsl.kinds.values import NONE

KINDS = {"linear_attention": "M", "full_attention": "A", "mlp": "F", "moe": "E"}
ROUTER = dict(groups="n_group", top_groups="topk_group", renorm="norm_topk_prob", scale="routed_scaling_factor")


def _shared_d_ff(c: Settings) -> int:
    return c.n_shared_experts * c.moe_shared_expert_intermediate_size


RECIPES = {
    "M": Recipe(
        "mamba2",
        dict(
            heads="mamba_num_heads", head_dim="mamba_head_dim", d_state="ssm_state_size", groups="n_groups",
            d_conv="conv_kernel", chunk="chunk_size", conv_bias="use_conv_bias", bias="use_bias",
            norm_eps="layer_norm_epsilon", dt_min="time_step_min", dt_max="time_step_max", dt_floor="time_step_floor",
            dt_limit=dt_limit(), gated_norm=fixed("after_gate"),
        ),
        mixers.mamba2,
    ),
    "A": Recipe(
        "attention",
        dict(
            heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim", rope=fixed(NONE),
            window=fixed(None),
        ),
        mixers.QKV,
    ),
    "F": Recipe(
        "mlp", dict(d_ff="intermediate_size", act=act("mlp_hidden_act"), gated=fixed(False), bias="mlp_bias")
    ),
    "E": Recipe(
        "moe",
        dict(
            experts="n_routed_experts", top_k="num_experts_per_tok", d_ff="moe_intermediate_size",
            act=act("mlp_hidden_act"), gated=fixed(False), router=router("sigmoid", **ROUTER), latent="moe_latent_size",
            shared_d_ff=Both(
                ("moe_shared_expert_intermediate_size",), _shared_d_ff,
                lambda v: {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": v},
            ),
        ),
        lambda f: mixers.experts(f) | mixers.shared("shared_experts") | {
            "router.weight": "gate.weight", "router.bias": "gate.e_score_correction_bias",
            "latent_in_proj.weight": "fc1_latent_proj.weight", "latent_out_proj.weight": "fc2_latent_proj.weight",
        },
    ),
}


def layers(c: Settings) -> Iterator[Layer]:
    for i, name in enumerate(c.layers_block_type):
        at = f"backbone.layers.{i}"
        yield Layer((KINDS[name],), (f"{at}.mixer",), f"{at}.norm.weight")


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    back = {recipe: name for name, recipe in KINDS.items()}
    return {"layers_block_type": [back.get("+".join(row)) for row in rows]}


def _depths(c: Settings) -> int:
    return c.num_nextn_predict_layers or 1


def _ahead(c: Settings, depth: int) -> Iterator[Layer]:
    kinds = c.mtp_layers_block_type
    for i, name in enumerate(kinds, depth * len(kinds)):
        at = f"mtp.layers.{i}"
        yield Layer((KINDS[name],), (f"{at}.mixer",), f"{at}.norm.weight")


def _ends(c: Settings, depth: int) -> Mapping[str, str]:
    """With the first and the last layer of the depth."""
    count = len(c.mtp_layers_block_type)
    first, last = depth * count, (depth + 1) * count - 1
    before = {name: f"mtp.layers.{first}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")}
    return {**before, "final_norm": f"mtp.layers.{last}.final_layernorm.weight"}


def _tail_settings(depths: int, rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    kinds = {"mtp_layers_block_type": order(rows)["layers_block_type"]} if depths else {}
    return {"num_nextn_predict_layers": depths, **kinds}


FAMILIES = (
    Family(
        "nemotron_h", "NemotronHForCausalLM",
        dict(
            vocab="vocab_size", d_model="hidden_size", norm=norm("layer_norm_epsilon"),
            tie_embeddings="tie_word_embeddings", context="max_position_embeddings", residual_dtype=FP32_STREAM,
        ),
        RECIPES, layers, order,
        demands={
            "attention_bias": False, "attention_dropout": 0, "hidden_dropout": 0, "mamba_hidden_act": "silu",
            "mamba_proj_bias": False, "sliding_window": None,
        },
        embed="backbone.embeddings.weight", final="backbone.norm_f.weight",
        follows=(
            "num_hidden_layers", "expand", "hybrid_override_pattern", "mtp_hybrid_override_pattern",
            "mtp_layers_block_type",
        ),
        tail=Tail(
            ("num_nextn_predict_layers",), _depths, _ahead, _ends, _tail_settings, empty=("mtp.*",),
        ),
    ),
)
