"""Kimi Linear and Ling 3.0: Kimi Delta Attention or latent attention, then an MLP or experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.adapt.tensors import Cut, Piece, Place, Rows
from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import act, apart, by_type, form, norm, pairs, read_rope, router, sharpness, write_rope
from mambadsl.hf.family import Both, Family, Layer, Recipe, Tail, fixed, key, read_only
from mambadsl.kinds.values import NONE, Values, Variant

SETTINGS = dict(
    vocab="vocab_size", d_model="hidden_size", norm=norm(), tie_embeddings="tie_word_embeddings",
    context="max_position_embeddings",
)
LAYERS, FEEDS = {"linear_attention": "K", "full_attention": "L"}, {"dense": "F", "sparse": "E"}
DELTA = dict(
    heads="linear_num_heads", key_dim="linear_head_dim",
    value_dim=read_only("linear_head_dim", lambda c: c.linear_head_dim),
    d_conv="linear_conv_kernel_dim", norm_eps="rms_norm_eps",
)
LATENT = dict(
    heads="num_attention_heads", nope_dim="qk_nope_head_dim", rope_dim="qk_rope_head_dim", value_dim="v_head_dim",
    kv_rank="kv_lora_rank",
    # The class's own, whatever rms_norm_eps says.
    norm_eps=fixed(1e-6),
)
FEED = dict(act=act(), gated=fixed(True))
ROUTER = router(
    "sigmoid", groups="n_group", top_groups="topk_group", renorm="norm_topk_prob", scale="routed_scaling_factor"
)
MLP = Recipe("mlp", FEED | dict(d_ff="intermediate_size"), mixers.GATED)


def _shared_d_ff(c: Settings) -> int:
    return c.n_shared_experts * c.moe_intermediate_size


def _experts(names: Callable[[Values], Mapping[str, Place]]) -> Recipe:
    fields = dict(
        experts="num_local_experts", top_k="num_experts_per_tok", d_ff="moe_intermediate_size", router=ROUTER,
        shared_d_ff=read_only("n_shared_experts", _shared_d_ff),
    )
    return Recipe("moe", FEED | fields, lambda f: mixers.shared("shared_experts") | dict(names(f)))


def _delta_names(f: Values, *, gate: str, decay: str) -> dict[str, Place]:
    convs = (Piece(f"{name}_conv1d.weight", shape=(-1, 1, f.d_conv)) for name in "qkv")
    projections = "q_proj", "k_proj", "v_proj", gate, "b_proj", decay
    return {
        "in_proj.weight": tuple(f"{name}.weight" for name in projections), "conv.weight": Cut(*convs),
        "gate_norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight",
    }


def _kimi_delta(f: Values) -> dict[str, Place]:
    return _delta_names(f, gate="g_a_proj", decay="f_a_proj") | {
        "decay_proj.weight": "f_b_proj.weight", "gate_proj.weight": "g_b_proj.weight",
        "A_log": Rows(Piece("A_log", shape=(1, 1, -1, 1))),
    }


def _latent_names(f: Values) -> dict[str, Place]:
    query = "q_a_proj.weight" if f.q_rank else "q_proj.weight"
    latent = Piece("kv_a_proj_with_mqa.weight", ("latent", "k_rope"))
    return {
        "in_proj.weight": Rows(query, latent), "q_norm.weight": "q_a_layernorm.weight",
        "q_proj.weight": "q_b_proj.weight", "latent_norm.weight": "kv_a_layernorm.weight",
        "kv_proj.weight": Rows(Piece("kv_b_proj.weight", ("k", "v"), groups=f.heads)),
    }


def _ling_latent(f: Values) -> dict[str, Place]:
    latent = Piece("kv_a_proj_with_mqa.weight", ("latent", "k_rope"))
    gated = Rows("q_proj.weight", latent, "g_proj.weight")
    return _latent_names(f) | {"in_proj.weight": gated, "o_proj.weight": "dense.weight"}


def _layers(mixer: str, experts: str) -> Callable[[Settings], Iterator[Layer]]:
    def layers(c: Settings) -> Iterator[Layer]:
        paths = {"F": "mlp", "E": experts}
        feeds = [FEEDS[name] for name in c.mlp_layer_types]
        yield from pairs([(LAYERS[name], mixer) for name in c.layer_types], [(name, paths[name]) for name in feeds])

    return layers


def _order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    _, feeding = apart(rows, "FE")
    feeds = {recipe: name for name, recipe in FEEDS.items()}
    return {**by_type(rows, LAYERS, "FE"), "mlp_layer_types": [feeds[name] for name in feeding]}


def _derived(fields: Mapping[str, Values], model: Values) -> Mapping[str, Any]:
    shared = {"n_shared_experts": fields["E"].shared_d_ff // fields["E"].d_ff} if "E" in fields else {}
    return shared | ({"num_key_value_heads": fields["L"].heads} if "L" in fields else {})


def _read_turn(given: Mapping[str, Any]) -> Variant:
    """Of all `qk_rope_head_dim` channels, neighbours together."""
    found = read_rope(given)
    if found.name != "rope":
        raise Unlike("does not turn channels in pairs of neighbours")
    scaling = getattr(found, "scaling", NONE)
    if scaling != NONE and found.fraction != 1:
        raise Unlike(f"has `partial_rotary_factor` {found.fraction} beside its scaling; only 1 has a counterpart")
    return form("rope", theta=found.theta, pairs="interleaved", scaling=scaling)


def _read_scale(c: Settings) -> float | None:
    """With yarn it may grow, as DeepSeek's does."""
    everywhere = c.rope_parameters.get("mscale_all_dim")
    if not everywhere or c.rope_parameters.get("rope_type", "default") == "default":
        return None
    return c.qk_head_dim**-0.5 * sharpness(c.rope_parameters["factor"], everywhere) ** 2


def _ling_derived(fields: Mapping[str, Values], model: Values) -> Mapping[str, Any]:
    found, f = dict(_derived(fields, model)), fields.get("L")
    if f is None or f.scale is None:
        return found
    factor = f.rope.scaling.factor if f.rope.name == "rope" and f.rope.scaling.name == "yarn" else 1
    if factor <= 1:
        raise Unlike("`scale` of `mla` follows from yarn, without which it is auto")
    sharp = (f.scale * (f.nope_dim + f.rope_dim) ** 0.5) ** 0.5
    everywhere = {"mscale_all_dim": (sharp - 1) / (0.1 * math.log(factor))}
    return {**found, "rope_parameters": write_rope(f.rope) | everywhere}


def _decay(c: Settings) -> Variant:
    return form("bounded", lower_bound=c.kda_lower_bound) if c.kda_safe_gate else form("softplus")


def _write_decay(value: Variant) -> Mapping[str, Any]:
    bounded = value.name == "bounded"
    return {"kda_safe_gate": bounded} | ({"kda_lower_bound": value.lower_bound} if bounded else {})


def _ahead_types(c: Settings) -> tuple[str, str]:
    """Of every depth: the mixer's and the feed-forward layer's."""
    mixers_, feeds = (set(c.get(name) or [usual]) for name, usual in AHEAD.items())
    if len(mixers_) > 1 or len(feeds) > 1:
        raise Unlike("has depths with different layers; only equal ones have a counterpart")
    return mixers_.pop(), feeds.pop()


def _depths(c: Settings) -> int:
    _ahead_types(c)
    return c.num_mtp_layers or 1


def _ahead(c: Settings, depth: int) -> Iterator[Layer]:
    """Blocks that are numbered on from the last one."""
    mixer, feed = _ahead_types(c)
    yield from pairs([(LAYERS[mixer], "attention")], [(FEEDS[feed], "mlp")], first=c.num_hidden_layers + depth)


def _ends(c: Settings, depth: int) -> Mapping[str, str]:
    at = f"model.layers.{c.num_hidden_layers + depth}"
    names = {name: f"{at}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")}
    return {**names, "final_norm": f"{at}.final_layernorm.weight"}


def _tail_settings(depths: int, rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    if not depths:
        return {"num_nextn_predict_layers": 0}
    found = _order(rows)
    types = {"mtp_layer_types": found["layer_types"], "mtp_mlp_layer_types": found["mlp_layer_types"]}
    return {"num_nextn_predict_layers": depths} | {name: depths * value for name, value in types.items()}


#: What the blocks are that predict further tokens, where the configuration does not say.
AHEAD = {"mtp_layer_types": "full_attention", "mtp_mlp_layer_types": "sparse"}
DEMANDS = {"attention_bias": False, "attention_dropout": 0}
FAMILIES = (
    Family(
        "kimi_linear", "KimiLinearForCausalLM", SETTINGS,
        {
            "K": Recipe(
                "kimi_delta",
                DELTA | dict(
                    decay=fixed(form("softplus")),
                    decay_rank=read_only("linear_head_dim", lambda c: c.linear_head_dim),
                    gate_rank=read_only("linear_head_dim", lambda c: c.linear_head_dim),
                ),
                _kimi_delta,
            ),
            "L": Recipe("mla", LATENT | dict(q_rank="q_lora_rank", rope=fixed(NONE)), _latent_names),
            "F": MLP,
            "E": _experts(lambda f: mixers.experts(f, gate="w1", up="w3", down="w2") | {
                "router.weight": "gate.weight", "router.bias": "gate.e_score_correction_bias",
            }),
        },
        _layers("self_attn", "block_sparse_moe"), _order, demands=DEMANDS, derived=_derived,
        follows=(
            "num_hidden_layers", "num_key_value_heads", "qk_head_dim", "head_dim", "linear_attn_config",
            "first_k_dense_replace", "moe_layer_freq", "mla_use_nope", "rope_theta", "rope_scaling", "rope_parameters",
        ),
        # transformers saves the dense layers under the experts' name.
        renamed={".mlp.": ".block_sparse_moe."},
    ),
    Family(
        "bailing_hybrid", "BailingHybridForCausalLM", SETTINGS,
        {
            "K": Recipe(
                "kimi_delta",
                DELTA | dict(
                    heads="num_attention_heads", d_conv="short_conv_kernel_size", decay_rank=fixed(None),
                    gate_rank=fixed(None),
                    decay=Both(("kda_safe_gate", "kda_lower_bound"), _decay, _write_decay),
                ),
                lambda f: _delta_names(f, gate="g_proj", decay="f_proj"),
            ),
            "L": Recipe(
                "mla",
                LATENT | dict(
                    q_rank=fixed(None), out_gate=fixed("per_head"),
                    rope=key("rope_parameters", _read_turn, write_rope),
                    scale=read_only("rope_parameters", _read_scale),
                ),
                _ling_latent,
            ),
            "F": MLP,
            "E": _experts(lambda f: mixers.experts(f) | {
                "router.weight": "gate.weight", "router.bias": "gate.expert_bias",
            }),
        },
        _layers("attention", "mlp"), _order, demands=DEMANDS, derived=_ling_derived,
        embed="model.word_embeddings.weight",
        follows=(
            "num_hidden_layers", "num_key_value_heads", "qk_head_dim", "head_dim", "layer_group_size",
            "first_k_dense_replace", "linear_num_heads", "linear_conv_kernel_dim", "rope_theta",
            "mtp_loss_scaling_factor",
        ),
        # transformers saves all blocks' last projections under one name, and reads the norm of a depth under another.
        renamed={".attention.o_proj.": ".attention.dense.", ".final_layernorm.": ".shared_head.norm."},
        tail=Tail(
            ("num_nextn_predict_layers", "num_mtp_layers"), _depths, _ahead, _ends, _tail_settings,
            follows=tuple(AHEAD),
        ),
    ),
)
