"""OLMo Hybrid: blocks of the gated delta rule with norms before their layers, blocks of attention with norms behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.adapt.tensors import Cut, Piece, Place
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, form, head_dim, norm, rope
from mambadsl.hf.family import Family, Layer, Recipe, fixed, read_only
from mambadsl.kinds.values import Values

FEED = dict(act=act(), gated=fixed(True), d_ff="intermediate_size")
BEHIND = dict(residual=fixed(form("post")))
#: Recipes of a block.
BLOCKS = {"linear_attention": ("D", "F"), "full_attention": ("A", "G")}


def _delta(f: Values) -> dict[str, Place]:
    each = [Piece(f"{name}_conv1d.weight", shape=(-1, 1, f.d_conv)) for name in "qkv"]
    return {
        "in_proj.weight": tuple(f"{name}_proj.weight" for name in "qkvgba"), "conv.weight": Cut(*each),
        "gate_norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight",
    }


RECIPES = {
    "D": Recipe(
        "gated_delta_net",
        dict(
            heads="linear_num_value_heads", key_heads="linear_num_key_heads", key_dim="linear_key_head_dim",
            value_dim="linear_value_head_dim", d_conv="linear_conv_kernel_dim",
            negative_eigenvalues="linear_allow_neg_eigval", norm_eps=fixed(1e-5), dt_min="linear_dt_min",
            dt_max="linear_dt_max", dt_floor="linear_dt_init_floor",
        ),
        _delta,
    ),
    "A": Recipe(
        "attention",
        dict(
            heads="num_attention_heads", kv_heads="num_key_value_heads", qkv_bias="attention_bias",
            o_bias="attention_bias",
            head_dim=read_only("num_attention_heads", head_dim),
            rope=rope(), qk_norm=norm("rms_norm_eps", "full_width"),
        ) | BEHIND,
        mixers.QKV,
    ),
    "F": Recipe("mlp", FEED | dict(residual=fixed(form("pre"))), mixers.GATED),
    "G": Recipe("mlp", FEED | BEHIND, mixers.GATED),
}


def layers(c: Settings) -> Iterator[Layer]:
    for i, kind in enumerate(c.layer_types):
        at = f"model.layers.{i}"
        if kind == "full_attention":
            yield Layer(("A",), (f"{at}.self_attn",), f"{at}.post_attention_layernorm.weight")
            yield Layer(("G",), (f"{at}.mlp",), f"{at}.post_feedforward_layernorm.weight")
        else:
            yield Layer(("D",), (f"{at}.linear_attn",), f"{at}.attention_layer_norm.weight")
            yield Layer(("F",), (f"{at}.mlp",), f"{at}.feedforward_layer_norm.weight")


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    back = {recipes: name for name, recipes in BLOCKS.items()}
    found = []
    for i in range(0, len(rows), 2):
        names = tuple("+".join(row) for row in rows[i : i + 2])
        if names not in back:
            raise Unlike(f"stack.{i} and the next must be a gated delta net and an MLP, or both behind their norms "
                         "attention and an MLP")
        found.append(back[names])
    return {"num_hidden_layers": len(found), "layer_types": found}


FAMILIES = (
    Family(
        "olmo_hybrid", "OlmoHybridForCausalLM",
        dict(
            vocab="vocab_size", d_model="hidden_size", norm=norm(), tie_embeddings="tie_word_embeddings",
            context="max_position_embeddings",
        ),
        RECIPES, layers, order, demands={"attention_dropout": 0},
        # The first two: initial values.
        follows=("linear_a_log_min", "linear_a_log_max", "num_hidden_layers"),
        # transformers saves the norm behind attention under the name that the other blocks' second norm has.
        renamed={"post_attention_layernorm": "feedforward_layer_norm"},
    ),
)
