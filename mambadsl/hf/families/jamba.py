"""Jamba: Mamba-1 or attention, then an MLP or experts, by periods and offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, apart, expand, form, head_dim, norm, pairs
from mambadsl.hf.family import Family, Layer, Recipe, fixed, read_only

FEED = dict(d_ff="intermediate_size", act=act(), gated=fixed(True))
RECIPES = {
    "M": Recipe(
        "mamba1",
        dict(
            d_inner=read_only("mamba_expand", lambda c: c.mamba_expand * c.hidden_size),
            d_state="mamba_d_state", d_conv="mamba_d_conv", dt_rank="mamba_dt_rank", conv_bias="mamba_conv_bias",
            bias="mamba_proj_bias", dt_bc_norm=norm("rms_norm_eps", "learned"),
        ),
        mixers.mamba1,
    ),
    "A": Recipe(
        "attention",
        dict(
            heads="num_attention_heads", kv_heads="num_key_value_heads",
            head_dim=read_only("num_attention_heads", head_dim),
            rope=fixed(form("none")),
        ),
        mixers.QKV,
    ),
    "F": Recipe("mlp", FEED, mixers.GATED),
    "E": Recipe(
        "moe",
        FEED | dict(experts="num_experts", top_k="num_experts_per_tok", router=fixed(form("softmax"))),
        mixers.experts,
    ),
}


def layers(c: Settings) -> Iterator[Layer]:
    kinds = {"attention": ("A", "self_attn"), "mamba": ("M", "mamba")}
    yield from pairs(
        [kinds[name] for name in c.layers_block_type],
        [("E" if count > 1 else "F", "feed_forward") for count in c.layers_num_experts],
        norms=("input_layernorm", "pre_ff_layernorm"),
    )


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    mixing, feeding = apart(rows, "FE")
    found = {"num_hidden_layers": len(mixing)}
    found |= _period([name == "A" for name in mixing], "attn_layer", "attention")
    found |= _period([name == "E" for name in feeding], "expert_layer", "experts")
    return found if "E" in feeding else {**found, "num_experts": 1, "num_experts_per_tok": 1}


def _period(chosen: list[bool], name: str, what: str) -> Mapping[str, Any]:
    """The period and offset at which layers are of a kind; none: beyond the last."""
    places = [i for i, is_so in enumerate(chosen) if is_so]
    if not places:
        return {f"{name}_period": len(chosen) + 1, f"{name}_offset": len(chosen)}
    period = places[1] - places[0] if len(places) > 1 else len(chosen)
    if places != list(range(places[0], len(chosen), period)) or places[0] >= period:
        raise Unlike(f"{what} must come at a fixed period, and stand in blocks {places}")
    return {f"{name}_period": period, f"{name}_offset": places[0]}


FAMILIES = (
    Family(
        "jamba", "JambaForCausalLM",
        dict(
            vocab="vocab_size", d_model="hidden_size", norm=norm(), tie_embeddings="tie_word_embeddings",
            context="max_position_embeddings",
        ),
        RECIPES, layers, order, demands={"attention_dropout": 0}, final="model.final_layernorm.weight",
        derived=expand("mamba_expand", lambda m: m.d_inner),
        follows=(
            "num_hidden_layers", "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset",
        ),
    ),
)
