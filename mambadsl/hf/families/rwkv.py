"""RWKV-4: time mixing, then channel mixing; the embeddings are normed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.tensors import Piece, Place, Rows
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import apart, form, norm, pairs
from mambadsl.hf.family import Family, Layer, Recipe, fixed

NAMES = {"k": "key", "v": "value", "r": "receptance"}
NORM = norm("layer_norm_epsilon", "layernorm")


def _shares(letters: str) -> dict[str, Place]:
    return {f"mix_{n}": Rows(Piece(f"time_mix_{NAMES[n]}", shape=(1, 1, -1))) for n in letters}


RECIPES = {
    "W": Recipe(
        "wkv4", dict(d_inner="attention_hidden_size", norm=NORM),
        {
            **_shares("kvr"), **{f"{n}_proj.weight": f"{name}.weight" for n, name in NAMES.items()},
            "out_proj.weight": "output.weight",
        },
    ),
    "C": Recipe(
        "channel_mix", dict(d_ff="intermediate_size", norm=NORM),
        {
            **_shares("kr"), "up_proj.weight": "key.weight", "r_proj.weight": "receptance.weight",
            "down_proj.weight": "value.weight",
        },
    ),
}


def layers(c: Settings) -> Iterator[Layer]:
    count = c.num_hidden_layers
    yield from pairs(
        [("W", "attention")] * count, [("C", "feed_forward")] * count, base="rwkv.blocks", norms=("ln1", "ln2"),
    )


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    mixing, _ = apart(rows, "C")
    return {"num_hidden_layers": len(mixing)}


FAMILIES = (
    Family(
        "rwkv", "RwkvForCausalLM",
        dict(
            vocab="vocab_size", d_model="hidden_size", context="context_length", tie_embeddings="tie_word_embeddings",
            embedding_norm=NORM,
            # That of the last norm is not a setting.
            norm=fixed(form("layernorm", eps=1e-5)),
        ),
        RECIPES, layers, order, embed="rwkv.embeddings.weight", embed_norm="rwkv.blocks.0.pre_ln.weight",
        final="rwkv.ln_out.weight", head="head.weight",
        # Halves the stream every so many layers, for half precision: norms take that away.
        follows=("rescale_every",),
    ),
)
