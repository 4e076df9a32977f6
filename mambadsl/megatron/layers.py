"""Megatron's layers by their letters: which arguments are which fields, and where their tensors lie.

Read in both directions, as all tables of `adapt`. A tensor's name is below its layer. Layouts are those of one tensor
rank; `weights.py` says how ranks share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mambadsl.adapt.table import Both, Recipe, Unlike, fixed, key
from mambadsl.adapt.tensors import Experts, Piece, Place, Rows
from mambadsl.kinds.values import NONE, Values, Variant
from mambadsl.megatron.arguments import Arguments


@dataclass(frozen=True)
class Letter:
    """path: of its mixer below the layer. norm: of the tensors of the norm before it, with {} for weight and bias."""

    recipe: Recipe
    path: str
    norm: str


def needed(name: str) -> Both:
    return Both((name,), lambda c: c.needed(name), lambda value: {name: value})


def derived(
    name: str, read: Callable[[Arguments], Any], write: Callable[[Any], Mapping[str, Any]] | None = None
) -> Both:
    """Read with others; written as it is."""
    return Both((name,), read, write or (lambda value: {name: value}))


def always(
    value: Any, name: str, holds: Callable[[Arguments], bool], says: str, written: Mapping[str, Any] = {}
) -> Both:
    """Ours is this where theirs is so, and there is no counterpart otherwise."""
    def read(c: Arguments) -> Any:
        if not holds(c):
            raise Unlike(says)
        return value

    return Both((name,), read, lambda value: written)


def _normed_by_rms(c: Arguments) -> bool:
    return c.normalization == "RMSNorm" and not c.layernorm_zero_centered_gamma


# ---- M, G


def _mamba_heads(c: Arguments) -> int:
    if c.mamba_num_heads is not None:
        return c.mamba_num_heads
    heads, rest = divmod(2 * c.needed("hidden_size"), c.mamba_head_dim)
    if rest:
        raise Unlike(f"does not divide twice the hidden size, {2 * c.hidden_size}")
    return heads


def _conv(name: str, f: Values) -> Rows:
    return Rows(Piece(name, shape=(-1, 1, f.d_conv)))


MAMBA = Recipe(
    "mamba2",
    dict(
        heads=Both(("mamba_head_dim", "mamba_num_heads"), _mamba_heads, lambda v: {"mamba_num_heads": v}),
        head_dim="mamba_head_dim", d_state="mamba_state_dim", groups="mamba_num_groups", d_conv=fixed(4),
        chunk=fixed(128), norm_eps=fixed(1e-5),
    ),
    lambda f: {
        "conv.weight": _conv("conv1d_weight", f), "conv.bias": "conv1d_bias", "gate_norm.weight": "norm.weight",
    },
)
DELTA = Recipe(
    "gated_delta_net",
    dict(
        heads="linear_num_value_heads", key_heads="linear_num_key_heads", value_dim="linear_value_head_dim",
        key_dim="linear_key_head_dim", d_conv="linear_conv_kernel_dim", a_range=fixed((1, 16)),
        norm_eps="layernorm_epsilon",
        negative_eigenvalues=always(
            False, "normalization", _normed_by_rms,
            "must be RMSNorm, with a scale that is the weight itself, where there are layers `G`",
        ),
        conv_bias=always(
            False, "swiglu", lambda c: c.swiglu,
            "is needed where there are layers `G`: their activation is the MLPs', and must be silu",
            {"swiglu": True},
        ),
    ),
    lambda f: {
        "conv.weight": _conv("conv1d.weight", f), "conv.bias": "conv1d.bias", "gate_norm.weight": "out_norm.weight",
    },
)


# ---- *, +


def _attention_heads(c: Arguments) -> int:
    """As many groups as heads, unless grouping is asked for. Settings of a library have no flag to ask with."""
    if c.group_query_attention or c.form == "settings" and "group_query_attention" not in c.given:
        return c.num_query_groups or c.needed("num_attention_heads")
    return c.needed("num_attention_heads")


def _head_dim(c: Arguments) -> int:
    if c.kv_channels is not None:
        return c.kv_channels
    dim, rest = divmod(c.needed("hidden_size"), c.needed("num_attention_heads"))
    if rest:
        raise Unlike(f"does not divide the hidden size, {c.hidden_size}")
    return dim


def _is(row: int | tuple[int, ...], c: Arguments, name: str, number: Callable[[int], bool]) -> bool:
    """What a row of all layers, or every so many, says of this one."""
    if isinstance(row, int):
        return number(row)
    if c.layer > len(row):
        raise Unlike(f"has {len(row)} entries: it needs one for each layer, also for those that are no attention")
    return bool(row[c.layer - 1])


def _window(c: Arguments) -> int | None:
    if c.window_size is None or c.window_size[0] < 0:
        return None
    left, right = c.window_size
    if right > 0:
        raise Unlike(f"is {left},{right}; only `{left},0` has a counterpart: a token sees none after it")
    often = c.window_attn_skip_freq
    if often is None or _is(often, c, "window_attn_skip_freq", lambda n: n > 0 and c.layer % n != 0):
        return left + 1
    return None


def _rope(c: Arguments) -> Variant:
    kind = "rope" if c.use_rotary_position_embeddings else c.position_embedding_type
    if kind not in ("rope", "yarn", "none"):
        raise Unlike(f"is `{kind}`; with a counterpart: `none`, `rope`, `yarn`")
    if kind == "none" or _unroped(c):
        return NONE
    stretch = c.rotary_seq_len_interpolation_factor
    if kind == "yarn":
        if stretch is not None or c.mscale != 1 or c.mscale_all_dim != 0 or not c.yarn_correction_range_round_to_int:
            raise Unlike("is `yarn` with settings that have no counterpart: mscale must be 1, mscale_all_dim 0")
        scaling = Variant("yarn", Values(
            factor=c.rotary_scaling_factor, beta_fast=c.yarn_beta_fast or 32, beta_slow=c.yarn_beta_slow or 1,
            original_context=c.yarn_original_max_position_embeddings or 4096,
        ))
    else:
        scaling = NONE if stretch in (None, 1) else Variant("linear", Values(factor=stretch))
    return Variant("rope", Values(theta=c.rotary_base, fraction=c.rotary_percent, scaling=scaling))


def _unroped(c: Arguments) -> bool:
    often = c.no_rope_freq
    return often is not None and _is(often, c, "no_rope_freq", lambda n: n > 0 and c.layer % n == 0)


def _write_rope(value: Variant) -> dict[str, Any]:
    if value.name == "none":
        return {"position_embedding_type": "none"}
    scaling = value.scaling
    found = {"position_embedding_type": "rope", "rotary_base": value.theta, "rotary_percent": value.fraction}
    match scaling.name:
        case "linear":
            found["rotary_seq_len_interpolation_factor"] = scaling.factor
        case "yarn":
            found |= {
                "position_embedding_type": "yarn", "rotary_scaling_factor": scaling.factor,
                "yarn_beta_fast": scaling.beta_fast, "yarn_beta_slow": scaling.beta_slow,
                "yarn_original_max_position_embeddings": scaling.original_context,
            }
    return found


def _qk_norm(c: Arguments) -> Variant:
    if not c.qk_layernorm:
        return NONE
    if c.normalization != "RMSNorm":
        raise Unlike("is on, and queries are normed by RMSNorm only: `normalization` is another")
    return Variant("per_head", Values(eps=c.layernorm_epsilon, zero_centered=c.layernorm_zero_centered_gamma))


def _mla_rope(c: Arguments) -> Variant:
    """Stretched by 1, YaRN is a plain rotation."""
    plain = c.rotary_scaling_factor == 1 or c.rope_type == "rope" and c.mscale_all_dim == 0
    if not plain or c.rotary_percent != 1:
        raise Unlike("stretches the rotation of layers `+`, which has no counterpart here; 1 has")
    return Variant("rope", Values(theta=c.rotary_base, pairs="interleaved"))


def _mixed(f: Values) -> dict[str, Place]:
    """For each key/value head: its query heads, their gates, its key head, its value head."""
    held = ("q", "gate", "k", "v") if f.out_gate == "elementwise" else ("q", "k", "v")
    return {f"qkv_proj.{w}": Rows(Piece(f"linear_qkv.{w}", held, groups=f.kv_heads)) for w in ("weight", "bias")}


ATTENTION = Recipe(
    "attention",
    dict(
        heads=needed("num_attention_heads"),
        kv_heads=derived(
            "num_query_groups", _attention_heads, lambda v: {"group_query_attention": True, "num_query_groups": v}
        ),
        head_dim=derived("kv_channels", _head_dim),
        qkv_bias=derived(
            "add_qkv_bias", lambda c: c.add_bias_linear or c.add_qkv_bias, lambda v: {"add_qkv_bias": v}
        ),
        o_bias="add_bias_linear",
        out_gate=key(
            "attention_output_gate", lambda v: "elementwise" if v else "none", lambda v: v == "elementwise"
        ),
        qk_norm=derived("qk_layernorm", _qk_norm, lambda v: {"qk_layernorm": v.name != "none"}),
        window=derived("window_size", _window, lambda v: {"window_size": None if v is None else (v - 1, 0)}),
        rope=derived("position_embedding_type", _rope, _write_rope),
    ),
    lambda f: _mixed(f) | {
        "o_proj.weight": "linear_proj.weight", "o_proj.bias": "linear_proj.bias",
        "q_norm.weight": "q_layernorm.weight", "k_norm.weight": "k_layernorm.weight",
    },
)
LATENT = Recipe(
    "mla",
    dict(
        heads=needed("num_attention_heads"), value_dim="v_head_dim", nope_dim="qk_head_dim",
        rope_dim="qk_pos_emb_head_dim", kv_rank="kv_lora_rank", q_rank="q_lora_rank",
        rope=derived(
            "rotary_scaling_factor", _mla_rope,
            lambda v: {
                "rotary_base": v.values.get("theta"), "rope_type": "rope", "position_embedding_type": "rope",
            },
        ),
        norm_eps=derived("layernorm_epsilon", lambda c: c.layernorm_epsilon, lambda v: {"qk_layernorm": True}),
        out_gate=always(
            "none", "qk_layernorm",
            lambda c: c.qk_layernorm and _normed_by_rms(c),
            "must be on where there are layers `+`, with RMSNorm: the latents are normed",
        ),
        scale=always(
            None, "add_bias_linear", lambda c: not (c.add_bias_linear or c.add_qkv_bias),
            "is not as layers `+` need it: they have no biases", {"add_bias_linear": False},
        ),
    ),
    lambda f: {
        "in_proj.weight": Rows(
            "linear_q_down_proj.weight" if f.q_rank else "linear_q_proj.weight",
            Piece("linear_kv_down_proj.weight", ("latent", "k_rope")),
        ),
        "q_norm.weight": "linear_q_up_proj.layer_norm_weight", "q_proj.weight": "linear_q_up_proj.weight",
        "latent_norm.weight": "linear_kv_up_proj.layer_norm_weight",
        "kv_proj.weight": Rows(Piece("linear_kv_up_proj.weight", ("k", "v"), groups=f.heads)),
        "o_proj.weight": "linear_proj.weight",
    },
)


# ---- -, E


def _act(c: Arguments) -> str:
    if c.quick_geglu:
        raise Unlike("has no counterpart; `swiglu` and `squared_relu` have")
    if c.swiglu or c.squared_relu:
        return "silu" if c.swiglu else "relu2"
    # The kernel that adds the bias has the approximation by tanh.
    return "gelu_tanh" if c.add_bias_linear and c.bias_gelu_fusion else "gelu"


def _write_act(act: str) -> dict[str, Any]:
    return {"swiglu": act == "silu", "squared_relu": act == "relu2", "bias_gelu_fusion": act != "gelu"}


def _d_ff(c: Arguments) -> int:
    if c.ffn_hidden_size is not None:
        return c.ffn_hidden_size
    wide = 4 * c.needed("hidden_size")
    return wide * 2 // 3 // 64 * 64 if c.swiglu else wide


def _router(c: Arguments) -> Variant:
    scale = c.moe_router_topk_scaling_factor or 1
    if c.moe_router_score_function == "sigmoid":
        groups = (
            dict(groups=c.moe_router_num_groups, top_groups=c.moe_router_group_topk) if c.moe_router_group_topk else {}
        )
        bias, renorm = c.moe_router_enable_expert_bias, c.moe_router_topk > 1
        return Variant("sigmoid", Values(bias=bias, renorm=renorm, scale=scale, **groups))
    if c.moe_router_score_function != "softmax":
        raise Unlike(f"is `{c.moe_router_score_function}`; with a counterpart: `sigmoid`, `softmax`")
    if c.moe_router_group_topk or c.moe_router_enable_expert_bias:
        raise Unlike("is `softmax`: groups of experts and biases go with `sigmoid` here")
    order = "before_top_k" if c.moe_router_pre_softmax else "after_top_k"
    return Variant("softmax", Values(order=order, scale=scale))


def _write_router(value: Variant) -> dict[str, Any]:
    if value.name not in ("softmax", "sigmoid"):
        return {"moe_router_score_function": value.name}
    scale = None if value.scale == 1 else value.scale
    found = {"moe_router_score_function": value.name, "moe_router_topk_scaling_factor": scale}
    if value.name == "softmax":
        return found | {"moe_router_pre_softmax": value.order == "before_top_k"}
    if value.groups > 1:
        found |= {"moe_router_num_groups": value.groups, "moe_router_group_topk": value.top_groups}
    return found | {"moe_router_enable_expert_bias": value.bias}


def _aux_loss(c: Arguments) -> float:
    """Of all sorts together: theirs differ in the tokens that are taken together, a row's in `seq_aux_loss`."""
    sorts, coefficients = c.moe_router_load_balancing_type, c.moe_aux_loss_coeff
    if len(coefficients) == 1:
        coefficients *= len(sorts)
    return sum(much for sort, much in zip(sorts, coefficients) if sort.endswith("aux_loss"))


def _write_aux_loss(value: float) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": ("seq_aux_loss",), "moe_aux_loss_coeff": value} if value else {}


def _without_bias(c: Arguments) -> int:
    if c.add_bias_linear:
        raise Unlike("is not as layers `E` need it: experts have no biases")
    return c.moe_shared_expert_intermediate_size or 0


FEED = Recipe(
    "mlp",
    dict(
        d_ff=derived("ffn_hidden_size", _d_ff), act=derived("quick_geglu", _act, _write_act),
        gated=derived("swiglu", lambda c: c.swiglu, lambda v: {}), bias="add_bias_linear",
    ),
    lambda f: {
        f"{ours}.{w}": f"{theirs}.{w}" for w in ("weight", "bias") for ours, theirs in (
            ("gate_up_proj", "linear_fc1"), ("up_proj", "linear_fc1"), ("down_proj", "linear_fc2"),
        )
    },
)
EXPERTS = Recipe(
    "moe",
    dict(
        experts=needed("num_experts"), top_k="moe_router_topk",
        d_ff=derived("moe_ffn_hidden_size", lambda c: c.moe_ffn_hidden_size or _d_ff(c)),
        act=derived("quick_geglu", _act, _write_act), gated=derived("swiglu", lambda c: c.swiglu, lambda v: {}),
        router=derived("moe_router_score_function", _router, _write_router),
        shared_d_ff=Both(
            ("add_bias_linear", "moe_shared_expert_intermediate_size"), _without_bias,
            lambda v: {"moe_shared_expert_intermediate_size": v or None, "add_bias_linear": False},
        ),
        shared_gate=key("moe_shared_expert_gate", lambda v: "sigmoid" if v else "none", lambda v: v == "sigmoid"),
        latent="moe_latent_size",
        aux_loss=derived("moe_aux_loss_coeff", _aux_loss, _write_aux_loss),
        z_loss=key("moe_z_loss_coeff", lambda v: v or 0, lambda v: v or None),
        bias_rate=derived(
            "moe_router_bias_update_rate",
            lambda c: c.moe_router_bias_update_rate if c.moe_router_enable_expert_bias else 0,
            lambda v: {"moe_router_bias_update_rate": v or None},
        ),
    ),
    lambda f: {
        "router.weight": "router.weight", "router.bias": "router.expert_bias",
        "experts.gate_up_proj": Experts(f.experts, "experts.linear_fc1.weight{}"),
        "experts.up_proj": Experts(f.experts, "experts.linear_fc1.weight{}"),
        "experts.down_proj": Experts(f.experts, "experts.linear_fc2.weight{}"),
        "latent_in_proj.weight": "fc1_latent_proj.weight", "latent_out_proj.weight": "fc2_latent_proj.weight",
        "shared.gate_up_proj.weight": "shared_experts.linear_fc1.weight",
        "shared.up_proj.weight": "shared_experts.linear_fc1.weight",
        "shared.down_proj.weight": "shared_experts.linear_fc2.weight",
        "shared_gate.weight": "shared_experts.gate_weight",
    },
)

#: `D`, DeepSeek's sparse attention, has no kind.
LAYERS: dict[str, Letter] = {
    "M": Letter(MAMBA, "mixer", "mixer.in_proj.layer_norm_{}"),
    "G": Letter(DELTA, "self_attention", "self_attention.in_proj.layer_norm_{}"),
    "*": Letter(ATTENTION, "self_attention", "self_attention.linear_qkv.layer_norm_{}"),
    "+": Letter(LATENT, "self_attention", "input_layernorm.{}"),
    "-": Letter(FEED, "mlp", "mlp.linear_fc1.layer_norm_{}"),
    "E": Letter(EXPERTS, "mlp", "pre_mlp_layernorm.{}"),
}
