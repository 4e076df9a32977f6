"""MiniMax-Text-01 and M1: lightning attention or softmax attention, then experts; sums with the normed input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mambadsl.adapt.tensors import Piece, Place, Rows
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, by_type, form, head_dim, norm, pairs, read_rope, router, write_rope
from mambadsl.hf.family import Both, Family, Layer, Recipe, fixed
from mambadsl.kinds.kind import Weight
from mambadsl.kinds.values import Values, Variant

if TYPE_CHECKING:
    from torch import Tensor

KINDS = {"linear_attention": "L", "full_attention": "A"}


class Slope(Rows):
    """The slopes of a layer's heads, and beside them what transformers makes of them for blocks of so many tokens.
    Checkpoints of the authors' own have none of these: they follow from how deep the layer stands."""

    constant = True

    def __init__(self, block: int, *pieces: Piece):
        super().__init__(*pieces)
        self.block = block

    def below(self, path: str) -> Rows:
        return Slope(self.block, *Rows(*self.pieces).below(path).pieces)

    def written(
        self, weight: Weight, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        [(name, (heads, *_))] = self.shapes(weight)
        before, Q = name.removesuffix("slope_rate"), self.block
        yield name, (heads, 1, 1)
        yield from ((f"{before}{table}_decay", (heads, Q, 1)) for table in ("query", "key"))
        yield f"{before}diagonal_decay", (1, heads, Q, Q)

    def write(
        self, tensor: Tensor, weight: Weight, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> Iterator[tuple[str, Tensor]]:
        [(name, slope_H11)] = self._write(tensor, weight)
        before = name.removesuffix("slope_rate")
        yield name, slope_H11
        place_Q1 = slope_H11.new_tensor(range(1, self.block + 1))[:, None]
        yield f"{before}query_decay", (-slope_H11 * place_Q1).exp()
        yield f"{before}key_decay", (-slope_H11 * (self.block - place_Q1)).exp()
        apart_QQ = slope_H11 * (place_Q1 - place_Q1.T)[None, None]
        yield f"{before}diagonal_decay", (-apart_QQ).masked_fill(apart_QQ < 0, float("-inf")).exp()


def _lightning(f: Values) -> dict[str, Place]:
    qkv = Piece("qkv_proj.weight", ("q", "k", "v"), groups=f.heads)
    return {
        "in_proj.weight": Rows(qkv, "output_gate.weight"), "gate_norm.weight": "norm.weight",
        "slope": Slope(f.chunk, Piece("slope_rate", shape=(-1, 1, 1))),
    }


def _normed(name: str) -> Both:
    keys = f"{name}_alpha_factor", f"{name}_beta_factor"

    def read(c: Settings) -> Variant:
        return form("normed", **{ours: getattr(c, key) for ours, key in zip(("alpha", "beta"), keys)})

    return Both(keys, read, lambda v: {key: getattr(v, ours, None) for ours, key in zip(("alpha", "beta"), keys)})


def _rope(c: Settings) -> Variant:
    """The authors' code rotates `rotary_dim` channels; transformers' class rotates all."""
    given = dict(c.rope_parameters or {})
    if c.get("rotary_dim") and "partial_rotary_factor" not in given:
        given["partial_rotary_factor"] = c.rotary_dim / head_dim(c)
    return read_rope(given)


HEADS = dict(
    heads="num_attention_heads", head_dim=Both(("head_dim",), head_dim, lambda v: {"head_dim": v}),
)
RECIPES = {
    "L": Recipe(
        "lightning", HEADS | dict(chunk="block_size", norm_eps=fixed(1e-6), residual=_normed("linear_attn")), _lightning
    ),
    "A": Recipe(
        "attention",
        HEADS | dict(
            kv_heads="num_key_value_heads", residual=_normed("full_attn"),
            rope=Both(("rope_parameters",), _rope, lambda v: {"rope_parameters": write_rope(v)}),
        ),
        mixers.QKV,
    ),
    "E": Recipe(
        "moe",
        dict(
            experts="num_local_experts", top_k="num_experts_per_tok", d_ff="intermediate_size", act=act(),
            gated=fixed(True), router=router("softmax", also={"renorm": True}), residual=_normed("mlp"),
        ),
        lambda f: mixers.experts(f, gate="w1", up="w3", down="w2") | {"router.weight": "gate.weight"},
    ),
}


def layers(c: Settings) -> Iterator[Layer]:
    mixing = [(KINDS[name], "self_attn") for name in c.layer_types]
    yield from pairs(mixing, [("E", "block_sparse_moe")] * len(mixing))


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    return by_type(rows, KINDS, "E")


FAMILIES = (
    Family(
        "minimax", "MiniMaxForCausalLM",
        dict(
            vocab="vocab_size", d_model="hidden_size", norm=norm(), tie_embeddings="tie_word_embeddings",
            context="max_position_embeddings",
        ),
        RECIPES, layers, order, demands={"attention_dropout": 0, "sliding_window": None, "hidden_act": "silu"},
        follows=("num_hidden_layers", "rotary_dim"), empty=("*.query_decay", "*.key_decay", "*.diagonal_decay"),
    ),
)
