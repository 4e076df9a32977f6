"""LFM2 and LFM3: gated short convolutions or attention, then an MLP or experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import apart, by_type, form, head_dim, norm, pairs, rope, router
from mambadsl.hf.family import Both, Family, Layer, Recipe, fixed, read_only
from mambadsl.kinds.values import Values

KINDS = {"conv": ("C", "conv"), "full_attention": ("A", "self_attn")}
NORMS = "operator_norm", "ffn_norm"
SETTINGS = dict(
    vocab="vocab_size", d_model="hidden_size", norm=norm("norm_eps"), tie_embeddings="tie_word_embeddings",
    context="max_position_embeddings",
)


def _conv(f: Values) -> dict[str, Any]:
    return mixers.conv1d(f, name="conv")


def _d_ff(c: Settings) -> int:
    """LFM2's files give the width before it is made smaller and rounded up."""
    width = c.get("block_ff_dim") or c.intermediate_size
    if c.block_auto_adjust_ff_dim:
        scale, step = c.block_ffn_dim_multiplier, c.block_multiple_of
        width = int(2 * width / 3)
        width = width if scale is None else int(scale * width)
        width = -(-width // step) * step
    return width


MIXERS = {
    "C": Recipe("short_conv", dict(d_conv="conv_L_cache", bias="conv_bias", conv_bias="conv_bias"), _conv),
    "A": Recipe(
        "attention",
        dict(
            heads="num_attention_heads", kv_heads="num_key_value_heads",
            head_dim=read_only("num_attention_heads", head_dim),
            rope=rope(), qk_norm=norm("norm_eps", "per_head"),
        ),
        mixers.QKV | {
            "o_proj.weight": "out_proj.weight", "q_norm.weight": "q_layernorm.weight",
            "k_norm.weight": "k_layernorm.weight",
        },
    ),
}
MLP = dict(act=fixed("silu"), gated=fixed(True))


def layers(c: Settings) -> Iterator[Layer]:
    mixing = [KINDS[name] for name in c.layer_types]
    yield from pairs(mixing, [("F", "feed_forward")] * len(mixing), norms=NORMS)


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    return by_type(rows, {name: recipe for name, (recipe, _) in KINDS.items()}, "FE")


def moe_layers(c: Settings) -> Iterator[Layer]:
    mixing = [KINDS[name] for name in c.layer_types]
    dense = [i < c.num_dense_layers for i in range(len(mixing))]
    yield from pairs(mixing, [("F" if is_so else "E", "feed_forward") for is_so in dense], norms=NORMS)


def moe_order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    _, feeding = apart(rows, "FE")
    dense = next((i for i, name in enumerate(feeding) if name == "E"), len(feeding))
    return {**order(rows), "num_dense_layers": dense}


ROUTER = router(
    "sigmoid", also={"renorm_eps": 1e-6}, bias="use_expert_bias", renorm="norm_topk_prob", scale="routed_scaling_factor"
)
#: Type of layer -> recipe, path of the mixer.
LFM3_KINDS = {"conv": ("C", "conv"), "full_attention": ("A", "self_attn"), "sliding_attention": ("W", "self_attn")}
SANDWICH = dict(residual=fixed(form("sandwich")))
LFM3_NAMES = {"qkv_proj.weight": tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate"))}
LFM3_HEADS = SANDWICH | dict(
    heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim", out_gate=fixed("per_head"),
    qk_norm=norm("norm_eps", "per_head"),
)


def lfm3_layers(c: Settings) -> Iterator[Layer]:
    for i, kind in enumerate(c.layer_types):
        at, (recipe, path) = f"model.layers.{i}", LFM3_KINDS[kind]
        for name, below, norm_ in (recipe, path, "operator_norm"), ("F", "feed_forward", "ffn_norm"):
            yield Layer((name,), (f"{at}.{below}",), f"{at}.{norm_}.weight", f"{at}.post_{norm_}.weight")


def lfm3_order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    return by_type(rows, {name: recipe for name, (recipe, _) in LFM3_KINDS.items()}, "F")


LFM3 = Family(
    "lfm3", "Lfm3ForCausalLM", SETTINGS,
    {
        "C": replace(MIXERS["C"], fields=MIXERS["C"].fields | SANDWICH),
        "A": Recipe(
            "attention", LFM3_HEADS | dict(rope=rope(part="full_attention"), window=fixed(None)), LFM3_NAMES
        ),
        "W": Recipe(
            "attention", LFM3_HEADS | dict(rope=rope(part="sliding_attention"), window="sliding_window"), LFM3_NAMES
        ),
        "F": Recipe("mlp", MLP | SANDWICH | dict(d_ff="intermediate_size"), mixers.W123),
    },
    lfm3_layers, lfm3_order, final="model.embedding_norm.weight", follows=("num_hidden_layers",),
    demands={"attention_bias": False, "attention_dropout": 0, "use_sandwich_norm": True, "use_attention_gate": True},
)
FAMILIES = (
    LFM3,
    Family(
        "lfm2", "Lfm2ForCausalLM", SETTINGS,
        MIXERS | {
            "F": Recipe(
                "mlp",
                MLP | dict(d_ff=Both(
                    ("intermediate_size",), _d_ff,
                    lambda v: {"intermediate_size": v, "block_auto_adjust_ff_dim": False},
                )),
                mixers.W123,
            ),
        },
        layers, order, final="model.embedding_norm.weight",
        follows=(
            "num_hidden_layers", "full_attn_idxs", "block_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier",
            "block_auto_adjust_ff_dim",
        ),
    ),
    Family(
        "lfm2_moe", "Lfm2MoeForCausalLM", SETTINGS,
        MIXERS | {
            "F": Recipe("mlp", MLP | dict(d_ff="intermediate_size"), mixers.W123),
            "E": Recipe(
                "moe",
                MLP | dict(
                    experts="num_experts", top_k="num_experts_per_tok", d_ff="moe_intermediate_size", router=ROUTER,
                ),
                lambda f: mixers.experts(f, gate="w1", up="w3", down="w2") | {
                    "router.weight": "gate.weight", "router.bias": "expert_bias",
                },
            ),
        },
        moe_layers, moe_order, final="model.embedding_norm.weight", follows=("num_hidden_layers",),
    ),
)
