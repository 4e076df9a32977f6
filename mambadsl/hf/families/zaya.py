"""Zaya: compressed convolutional attention, then experts, with a router that goes on with the one before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.tensors import Piece, Place, Rows
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, by_type, form, norm, rope, router
from mambadsl.hf.family import Family, Layer, Recipe, fixed
from mambadsl.kinds.values import Values

#: Type of layer -> recipe.
KINDS = {"hybrid": "A", "hybrid_sliding": "W"}
AFFINE = dict(residual=fixed(form("affine")))


def _attention(f: Values) -> dict[str, Place]:
    at, taps = "qkv_proj", {"conv": "conv_qk_depthwise", "head_conv": "conv_qk_grouped"}
    shapes = {"conv": (-1, 1, f.d_conv), "head_conv": (-1, f.head_dim, f.d_head_conv)}
    return {
        **{
            f"qkv_proj.{w}": tuple(f"{at}.{n}.{w}" for n in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed"))
            for w in ("weight", "bias")
        },
        **{f"{ours}.weight": Rows(Piece(f"{at}.{theirs}.weight", shape=shapes[ours])) for ours, theirs in taps.items()},
        **{f"{ours}.bias": f"{at}.{theirs}.bias" for ours, theirs in taps.items()},
        "temperature": "qk_norm.temp",
    }


def _hybrid(kind: str, window: Any) -> Recipe:
    return Recipe(
        "cca",
        AFFINE | dict(
            heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim", d_conv="cca_time0",
            d_head_conv="cca_time1", bias="attention_bias", rope=rope(part=kind), window=window,
        ),
        _attention,
    )


EXPERT_NAMES = {
    **{f"router.enter.{w}": f"gate.down_proj.{w}" for w in ("weight", "bias")},
    **{f"router.{fc}.{w}": f"gate.router_mlp.{fc}.{w}" for fc in ("fc1", "fc2") for w in ("weight", "bias")},
    "router.norm.weight": "gate.router_mlp.norm.weight", "router.weight": "gate.router_mlp.out_proj.weight",
    "router.bias": "gate.balancing_biases", "router.carry_scale": "gate.router_states_scale",
}


def _experts(carry: str) -> Recipe:
    return Recipe(
        "moe",
        AFFINE | dict(
            experts="num_experts", top_k="num_experts_per_tok", d_ff="moe_intermediate_size", act=act(),
            gated=fixed(True), router=router(
                "mlp", also={"carry": carry}, d_router="router_hidden_size", eps="rms_norm_eps",
            ),
        ),
        EXPERT_NAMES,
    )


def layers(c: Settings) -> Iterator[Layer]:
    for i, kind in enumerate(c.layer_types):
        at = f"model.layers.{i}"
        for recipe, path, before, behind in (
            (KINDS[kind], "self_attn", "input_layernorm", "post_attention"),
            ("E" if i else "B", "mlp", "post_attention_layernorm", "post_mlp"),
        ):
            scaled = f"{at}.{behind}_residual_scale"
            affine = tuple((f"{scaled}.{of}_scale", f"{scaled}.{of}_bias") for of in ("hidden_states", "residual"))
            yield Layer((recipe,), (f"{at}.{path}",), f"{at}.{before}.weight", affine=affine)


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    return by_type(rows, KINDS, "BE")


FAMILIES = (
    Family(
        "zaya", "ZayaForCausalLM",
        dict(
            vocab="vocab_size", d_model="hidden_size", norm=norm(), tie_embeddings="tie_word_embeddings",
            context="max_position_embeddings", embedding_norm=fixed(form("affine")), residual_dtype=fixed("fp32"),
        ),
        {
            "A": _hybrid("hybrid", fixed(None)), "W": _hybrid("hybrid_sliding", "sliding_window"),
            "B": _experts("first"), "E": _experts("next"),
        },
        layers, order, demands={"attention_dropout": 0, "lm_head_bias": False},
        embed_norm=("model.input_hidden_states_scale", "model.input_hidden_states_bias"),
        follows=("num_hidden_layers",),
    ),
)
