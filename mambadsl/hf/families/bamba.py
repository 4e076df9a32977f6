"""Hybrids of Mamba-2 and attention whose settings have the same names: Bamba, Falcon-H1, Granite 4 H."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import (
    act,
    apart,
    by_type,
    dt_limit,
    expand,
    form,
    head_dim,
    norm,
    pairs,
    read_rope,
    rope,
    write_rope,
)
from mambadsl.hf.family import Both, Family, Layer, Recipe, fixed, key, read_only
from mambadsl.kinds.values import NONE, Values, Variant

SETTINGS = dict(
    vocab="vocab_size", d_model="hidden_size", norm=norm(), tie_embeddings="tie_word_embeddings",
    context="max_position_embeddings",
)
MAMBA2 = dict(
    heads="mamba_n_heads", head_dim="mamba_d_head", d_state="mamba_d_state", groups="mamba_n_groups",
    d_conv="mamba_d_conv", chunk="mamba_chunk_size", conv_bias="mamba_conv_bias", bias="mamba_proj_bias",
    norm_eps="rms_norm_eps", dt_limit=dt_limit(),
)


ATTENTION = dict(
    heads="num_attention_heads", kv_heads="num_key_value_heads", qkv_bias="attention_bias", o_bias="attention_bias",
    head_dim=read_only("head_dim", head_dim),
)
FEED = dict(act=act(), gated=fixed(True))
DEMANDS = {"attention_dropout": 0}


EXPAND = expand("mamba_expand", lambda m: m.heads * m.head_dim)


def bamba_layers(c: Settings) -> Iterator[Layer]:
    kinds = {"linear_attention": ("M", "mamba"), "full_attention": ("A", "self_attn")}
    mixing = [kinds[name] for name in c.layers_block_type]
    yield from pairs(mixing, [("F", "feed_forward")] * len(mixing), norms=("input_layernorm", "pre_ff_layernorm"))


def bamba_order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    mixing, _ = apart(rows, "F")
    return {
        "num_hidden_layers": len(mixing), "attn_layer_indices": [i for i, name in enumerate(mixing) if name == "A"],
    }


BAMBA = Family(
    "bamba", "BambaForCausalLM", SETTINGS,
    {
        "M": Recipe("mamba2", MAMBA2 | dict(gated_norm=fixed("after_gate")), mixers.mamba2),
        "A": Recipe("attention", ATTENTION | dict(rope=rope()), mixers.QKV),
        "F": Recipe("mlp", FEED | dict(d_ff="intermediate_size", bias="mlp_bias"), mixers.GATED),
    },
    bamba_layers, bamba_order, demands=DEMANDS, final="model.final_layernorm.weight", derived=EXPAND,
    follows=("num_hidden_layers", "attn_layer_indices", "mamba_expand"),
)


def _gated_norm(c: Settings) -> str:
    before = c.mamba_norm_before_gate
    return ("before_gate" if before else "after_gate") if c.mamba_rms_norm else "none"


def _one_bias(c: Settings) -> bool:
    if c.mamba_proj_bias != c.projectors_bias:
        raise Unlike("differs from `projectors_bias`; in_proj and out_proj have biases both or neither")
    return c.mamba_proj_bias


def falcon_layers(c: Settings) -> Iterator[Layer]:
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}"
        yield Layer(("M", "A"), (f"{at}.mamba", f"{at}.self_attn"), f"{at}.input_layernorm.weight")
        yield Layer(("F",), (f"{at}.feed_forward",), f"{at}.pre_ff_layernorm.weight")


def falcon_order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    for i, row in enumerate(rows):
        if row != (("F",) if i % 2 else ("M", "A")):
            turn = "an MLP" if i % 2 else "Mamba-2 + attention"
            raise Unlike(f"stack.{i} must be {turn}: the family's layers take turns")
    return {"num_hidden_layers": len(rows) // 2}


def _d_ssm(fields: Mapping[str, Values], model: Values) -> Mapping[str, Any]:
    m, f = fields["M"], fields["F"]
    return {"mamba_d_ssm": m.heads * m.head_dim, "mlp_multipliers": [f.gate_multiplier, f.out_multiplier]}


FALCON_H1 = Family(
    "falcon_h1", "FalconH1ForCausalLM",
    SETTINGS | dict(embedding_multiplier="embedding_multiplier", logits_multiplier="lm_head_multiplier"),
    {
        "M": Recipe(
            "mamba2",
            MAMBA2 | dict(
                bias=Both(("mamba_proj_bias",), _one_bias, lambda v: {"mamba_proj_bias": v, "projectors_bias": v}),
                gated_norm=Both(
                    ("mamba_norm_before_gate",), _gated_norm,
                    lambda v: {"mamba_rms_norm": v != "none", "mamba_norm_before_gate": v == "before_gate"},
                ),
                proj_multipliers=key("ssm_multipliers", tuple, list), in_multiplier="ssm_in_multiplier",
                out_multiplier="ssm_out_multiplier",
            ),
            mixers.mamba2,
        ),
        "A": Recipe(
            "attention",
            ATTENTION | dict(
                head_dim=Both(("head_dim",), head_dim, lambda v: {"head_dim": v}), rope=rope(),
                key_multiplier="key_multiplier", in_multiplier="attention_in_multiplier",
                out_multiplier="attention_out_multiplier",
            ),
            mixers.QKV,
        ),
        "F": Recipe(
            "mlp",
            FEED | dict(
                d_ff="intermediate_size", bias="mlp_bias",
                gate_multiplier=read_only("mlp_multipliers", lambda c: c.mlp_multipliers[0]),
                out_multiplier=read_only("mlp_multipliers", lambda c: c.mlp_multipliers[1]),
            ),
            mixers.GATED,
        ),
    },
    falcon_layers, falcon_order, demands=DEMANDS, final="model.final_layernorm.weight", derived=_d_ssm,
    follows=("mamba_d_ssm", "mamba_expand", "projectors_bias"),
)


def _granite_rope(c: Settings) -> Variant:
    return read_rope(c.rope_parameters) if c.position_embedding_type == "rope" else NONE


def _write_granite_rope(value: Variant) -> Mapping[str, Any]:
    if value.name == "none":
        return {"position_embedding_type": "nope"}
    return {"position_embedding_type": "rope", "rope_parameters": write_rope(value)}


GRANITE_MIXERS = {"linear_attention": ("M", "mamba"), "full_attention": ("A", "self_attn")}


def granite_layers(c: Settings) -> Iterator[Layer]:
    feed = ("E" if c.num_local_experts else "F"), ""
    mixing = [GRANITE_MIXERS[name] for name in c.layer_types]
    yield from pairs(mixing, [feed] * len(mixing))


def granite_order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    _, feeding = apart(rows, "FE")
    found = by_type(rows, {name: recipe for name, (recipe, _) in GRANITE_MIXERS.items()}, "FE")
    return found if "E" in feeding else {**found, "num_local_experts": 0, "num_experts_per_tok": 0}


SUM = dict(out_multiplier="residual_multiplier")
GRANITE_MLP = {
    "gate_up_proj.weight": "shared_mlp.input_linear.weight", "down_proj.weight": "shared_mlp.output_linear.weight",
}
GRANITE = Family(
    "granitemoehybrid", "GraniteMoeHybridForCausalLM",
    SETTINGS | dict(
        embedding_multiplier="embedding_multiplier",
        logits_multiplier=key("logits_scaling", lambda v: 1 / v, lambda v: 1 / v),
    ),
    {
        "M": Recipe("mamba2", MAMBA2 | SUM | dict(gated_norm=fixed("after_gate")), mixers.mamba2),
        "A": Recipe(
            "attention",
            ATTENTION | SUM | dict(
                scale="attention_multiplier",
                rope=Both(("rope_parameters", "position_embedding_type"), _granite_rope, _write_granite_rope),
            ),
            mixers.QKV,
        ),
        "F": Recipe("mlp", FEED | SUM | dict(d_ff="shared_intermediate_size"), GRANITE_MLP),
        "E": Recipe(
            "moe",
            FEED | SUM | dict(
                experts="num_local_experts", top_k="num_experts_per_tok", d_ff="intermediate_size",
                shared_d_ff="shared_intermediate_size", router=fixed(form("softmax", order="after_top_k")),
            ),
            {f"shared.{ours}": theirs for ours, theirs in GRANITE_MLP.items()} | {
                "router.weight": "block_sparse_moe.router.layer.weight",
                "experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
                "experts.down_proj": "block_sparse_moe.output_linear.weight",
            },
        ),
    },
    granite_layers, granite_order, demands=DEMANDS, derived=EXPAND, follows=("num_hidden_layers", "mamba_expand"),
)
FAMILIES = BAMBA, FALCON_H1, GRANITE
