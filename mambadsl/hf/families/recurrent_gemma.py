"""RecurrentGemma (Griffin): linear recurrent units and attention in a window, each before an MLP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.tensors import Piece, Place, Rows
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, apart, bfloat16, norm, pairs, rope
from mambadsl.hf.family import Both, Family, Layer, Recipe, fixed, read_only
from mambadsl.kinds.values import Values

KINDS = {"linear_attention": "R", "sliding_attention": "A"}
BLOCKS = {"R": "recurrent", "A": "attention"}


def _unit(f: Values) -> dict[str, Place]:
    per_block = f.blocks, f.d_inner // f.blocks
    return {
        **{f"in_proj.{w}": (f"linear_x.{w}", f"linear_y.{w}") for w in ("weight", "bias")},
        **{f"out_proj.{w}": f"linear_out.{w}" for w in ("weight", "bias")},
        **mixers.conv1d(f, name="conv_1d"),
        # Theirs multiply rows.
        "input_gate.weight": Rows(Piece("rg_lru.input_gate_weight", transposed=True)),
        "decay_gate.weight": Rows(Piece("rg_lru.recurrent_gate_weight", transposed=True)),
        "input_gate.bias": Rows(Piece("rg_lru.input_gate_bias", shape=per_block)),
        "decay_gate.bias": Rows(Piece("rg_lru.recurrent_gate_bias", shape=per_block)),
        "a_param": "rg_lru.recurrent_param",
    }


RECIPES = {
    "R": Recipe(
        "rg_lru",
        dict(
            d_inner="lru_width", blocks="num_attention_heads", d_conv="conv1d_width", act=act("hidden_activation"),
            bias=fixed(True), conv_bias=fixed(True), sharpness=fixed(8),
        ),
        _unit,
    ),
    "A": Recipe(
        "attention",
        dict(
            heads="num_attention_heads", kv_heads="num_key_value_heads", window="attention_window_size",
            head_dim=read_only("head_dim", lambda c: c.head_dim), rope=rope(), qkv_bias="attention_bias",
            o_bias=fixed(True),
        ),
        mixers.QKV,
    ),
    "F": Recipe(
        "mlp",
        dict(
            # The setting counts gate and up.
            d_ff=Both(
                ("intermediate_size",), lambda c: c.intermediate_size // 2, lambda v: {"intermediate_size": 2 * v},
            ),
            act=act("hidden_activation"), gated=fixed(True), bias=fixed(True),
        ),
        mixers.GATED,
    ),
}


def layers(c: Settings) -> Iterator[Layer]:
    mixing = [(KINDS[name], "temporal_block") for name in c.layers_block_type]
    norms = "temporal_pre_norm", "channel_pre_norm"
    yield from pairs(mixing, [("F", "mlp_block")] * len(mixing), norms=norms)


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    mixing, _ = apart(rows, "F")
    return {"num_hidden_layers": len(mixing), "block_types": [BLOCKS[name] for name in mixing]}


def _multiplier(c: Settings) -> float:
    """The square root of the width, rounded as its buffer is."""
    return bfloat16(c.hidden_size**0.5)


FAMILIES = (
    Family(
        "recurrent_gemma", "RecurrentGemmaForCausalLM",
        dict(
            vocab="vocab_size", d_model="hidden_size", norm=norm(zero_centered=True),
            tie_embeddings="tie_word_embeddings", logits_softcap="logits_soft_cap",
            embedding_multiplier=read_only("hidden_size", _multiplier),
        ),
        RECIPES, layers, order, demands={"attention_dropout": 0}, final="model.final_norm.weight",
        follows=("num_hidden_layers", "block_types"),
    ),
)
