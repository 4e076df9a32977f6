"""Qwen3-Next and Qwen3.5: the gated delta rule or gated attention, then an MLP or experts; zero-centred norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.adapt.tensors import Piece, Place, Rows
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, apart, by_type, norm, pairs, rope, router
from mambadsl.hf.family import Family, Layer, Recipe, Tail, fixed
from mambadsl.kinds.values import Values

KINDS = {"linear_attention": ("D", "linear_attn"), "full_attention": ("A", "self_attn")}
SETTINGS = dict(
    vocab="vocab_size", d_model="hidden_size", norm=norm(zero_centered=True), tie_embeddings="tie_word_embeddings",
    context="max_position_embeddings",
)
DELTA = dict(
    heads="linear_num_value_heads", key_heads="linear_num_key_heads", key_dim="linear_key_head_dim",
    value_dim="linear_value_head_dim", d_conv="linear_conv_kernel_dim", norm_eps="rms_norm_eps",
)
FEED = dict(act=act(), gated=fixed(True))
EXPERTS = FEED | dict(
    experts="num_experts", top_k="num_experts_per_tok", d_ff="moe_intermediate_size",
    shared_d_ff="shared_expert_intermediate_size", shared_gate=fixed("sigmoid"),
)


def _together(f: Values) -> dict[str, Place]:
    """Queries, keys, values and gates of each key head lie side by side, and so do b and a."""
    qkvz = Piece("in_proj_qkvz.weight", ("q", "k", "v", "z"), groups=f.key_heads)
    ba = Piece("in_proj_ba.weight", ("b", "a"), groups=f.key_heads)
    return mixers.mamba2(f) | {"in_proj.weight": Rows(qkvz, ba)}


def _apart(f: Values) -> dict[str, Place]:
    pieces = Piece("in_proj_qkv.weight", ("q", "k", "v")), *(f"in_proj_{name}.weight" for name in "zba")
    return mixers.mamba2(f) | {"in_proj.weight": Rows(*pieces)}


ATTENTION = Recipe(
    "attention",
    dict(
        heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim", qkv_bias="attention_bias",
        o_bias="attention_bias", rope=rope(), qk_norm=norm("rms_norm_eps", "per_head", zero_centered=True),
        out_gate=fixed("elementwise"),
    ),
    mixers.gated_q,
)
MLP = Recipe("mlp", FEED | dict(d_ff="intermediate_size"), mixers.GATED)


def _experts(f: Values) -> dict[str, Place]:
    return mixers.experts(f) | mixers.shared("shared_expert") | {
        "router.weight": "gate.weight", "shared_gate.weight": "shared_expert_gate.weight",
    }


def _moe(**names: str) -> Recipe:
    also = {} if names else {"renorm": True}
    return Recipe("moe", EXPERTS | dict(router=router("softmax", also=also, **names)), _experts)


def _mixing(c: Settings) -> list[tuple[str, str]]:
    return [KINDS[name] for name in c.layer_types]


def _order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    return by_type(rows, {name: recipe for name, (recipe, _) in KINDS.items()}, "FE")


def next_layers(c: Settings) -> Iterator[Layer]:
    mixing = _mixing(c)
    sparse = (
        i not in c.mlp_only_layers and c.num_experts > 0 and (i + 1) % c.decoder_sparse_step == 0
        for i in range(len(mixing))
    )
    yield from pairs(mixing, [("E" if is_so else "F", "mlp") for is_so in sparse])


def next_order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    dense = [i for i, name in enumerate(apart(rows, "FE")[1]) if name == "F"]
    return {**_order(rows), "mlp_only_layers": dense, "decoder_sparse_step": 1}


def _every(recipe: str) -> Any:
    def layers(c: Settings) -> Iterator[Layer]:
        mixing = _mixing(c)
        yield from pairs(mixing, [(recipe, "mlp")] * len(mixing))

    return layers


def _tail(feed: Callable[[Settings], str]) -> Tail:
    """One depth of full attention and a feed-forward layer of the kind `feed`, with ends of its own names."""

    def depths(c: Settings) -> int:
        said = {c.get(key) for key in keys if c.get(key)}
        if said - {1}:
            raise Unlike(f"is {max(said)}; only 1 has a counterpart: several share all but their layers")
        return 1

    def layers(c: Settings, depth: int) -> Iterator[Layer]:
        yield from pairs([KINDS["full_attention"]], [(feed(c), "mlp")], base="mtp.layers")

    def ends(c: Settings, depth: int) -> dict[str, str]:
        own = "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"
        return {ours: f"mtp.{theirs}.weight" for ours, theirs in zip(("enorm", "hnorm", "eh_proj", "final_norm"), own)}

    def settings(depths: int, rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
        return {"mtp_num_hidden_layers": depths} if depths else {}

    keys = "mtp_num_hidden_layers", "num_nextn_predict_layers"
    return Tail(keys, depths, layers, ends, settings, empty=("mtp.*", "model.mtp.*"))


DEMANDS = {"attention_dropout": 0, "mtp_use_dedicated_embeddings": False}
FOLLOWS = "num_hidden_layers", "full_attention_interval"
FAMILIES = (
    Family(
        "qwen3_next", "Qwen3NextForCausalLM", SETTINGS,
        {
            "D": Recipe("gated_delta_net", DELTA, _together), "A": ATTENTION, "F": MLP,
            "E": _moe(renorm="norm_topk_prob"),
        },
        next_layers, next_order, demands=DEMANDS, follows=FOLLOWS, tail=_tail(lambda c: "E" if c.num_experts else "F"),
    ),
    Family(
        "qwen3_5_text", "Qwen3_5ForCausalLM", SETTINGS,
        {"D": Recipe("gated_delta_net", DELTA, _apart), "A": ATTENTION, "F": MLP},
        _every("F"), _order, demands=DEMANDS, follows=FOLLOWS, tail=_tail(lambda c: "F"),
    ),
    Family(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", SETTINGS,
        {"D": Recipe("gated_delta_net", DELTA, _apart), "A": ATTENTION, "E": _moe()},
        _every("E"), _order, demands=DEMANDS, follows=FOLLOWS, tail=_tail(lambda c: "E"),
    ),
)
