"""Each shipped model is the published one: settings, order of layers and every field, translated from the
public configuration (by the Hugging Face class where there is one), never from the .mdl text."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from public_configs import CONFIGS, config, hugging_face_params

from mambadsl.compile import load
from mambadsl.files import MODELS
from mambadsl.kinds.values import Variant


class Branch(NamedTuple):
    kind: str
    fields: dict[str, Any]


Layer = list[Branch]


class Formed(list):
    """A layer with another residual form than x + f(norm(x))."""

    def __init__(self, branches: Layer, form: Any):
        super().__init__(branches)
        self.form = form


NO_LIMIT = (0, None)
MAMBA_KIND = "linear_attention"


def ssm1(c: Any, *, d_inner: int, norm: Any = "none") -> Branch:
    return Branch("mamba1", dict(
        d_inner=d_inner, d_state=c.state_size, d_conv=c.conv_kernel, dt_rank=c.time_step_rank,
        bias=c.use_bias, conv_bias=c.use_conv_bias, dt_bc_norm=norm, dt_min=c.time_step_min,
        dt_max=c.time_step_max, dt_floor=c.time_step_floor,
    ))


def ssm2(c: Any, eps: float, **more: Any) -> Branch:
    """The spelling that Bamba, Falcon-H1 and Granite share."""
    assert tuple(c.time_step_limit) == (0, float("inf"))
    return Branch("mamba2", dict(
        heads=c.mamba_n_heads, head_dim=c.mamba_d_head, d_state=c.mamba_d_state, groups=c.mamba_n_groups,
        d_conv=c.mamba_d_conv, chunk=c.mamba_chunk_size, conv_bias=c.mamba_conv_bias, bias=c.mamba_proj_bias,
        dt_limit=NO_LIMIT, norm_eps=eps, norm_groups=c.mamba_n_groups, gated_norm="after_gate",
    ) | more)


def attn(c: Any, rope: Any, **more: Any) -> Branch:
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Branch("attention", dict(
        heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=head_dim, rope=rope,
        window=None, qk_norm="none", scale=None, softcap=None, qkv_bias=False, o_bias=False,
    ) | more)


def mlp(d_ff: int, **more: Any) -> Branch:
    """Gated, unless it says otherwise."""
    return Branch("mlp", dict(d_ff=d_ff, act="silu", gated=True, bias=False) | more)


def mamba(c: Any) -> list[Layer]:
    return [[ssm1(c, d_inner=c.intermediate_size)]] * c.num_hidden_layers


def falcon_mamba(c: Any) -> list[Layer]:
    norm = ("weightless", dict(eps=c.mixer_rms_eps))
    return [[ssm1(c, d_inner=c.intermediate_size, norm=norm)]] * c.num_hidden_layers


def mamba2(c: Any) -> list[Layer]:
    assert tuple(c.time_step_limit) == (0, float("inf"))
    one = Branch("mamba2", dict(
        heads=c.num_heads, head_dim=c.head_dim, d_state=c.state_size, groups=c.n_groups, d_conv=c.conv_kernel,
        chunk=c.chunk_size, conv_bias=c.use_conv_bias, bias=c.use_bias, gated_norm="after_gate",
        norm_eps=c.layer_norm_epsilon, dt_limit=NO_LIMIT, dt_min=c.time_step_min, dt_max=c.time_step_max,
    ))
    return [[one]] * c.num_hidden_layers


def jamba(c: Any) -> list[Layer]:
    norm = ("learned", dict(eps=c.rms_norm_eps))
    scan = Branch("mamba1", dict(
        d_inner=c.mamba_expand * c.hidden_size, d_state=c.mamba_d_state, d_conv=c.mamba_d_conv,
        dt_rank=c.mamba_dt_rank, conv_bias=c.mamba_conv_bias, bias=c.mamba_proj_bias, dt_bc_norm=norm,
    ))
    router = ("softmax", dict(order="before_top_k", renorm=False, scale=1))
    experts = Branch("moe", dict(
        experts=c.num_experts, top_k=c.num_experts_per_tok, d_ff=c.intermediate_size, act="silu",
        gated=True, router=router, shared_d_ff=0, latent=None,
    ))
    layers: list[Layer] = []
    for mixer, count in zip(c.layers_block_type, c.layers_num_experts, strict=True):
        layers.append([attn(c, "none") if mixer == "attention" else scan])
        layers.append([experts if count > 1 else mlp(c.intermediate_size)])
    return layers


def bamba(c: Any) -> list[Layer]:
    given = c.rope_parameters
    rope = ("rope", dict(theta=given["rope_theta"], fraction=given["partial_rotary_factor"], scaling="none"))
    mixers = {MAMBA_KIND: ssm2(c, c.rms_norm_eps), "full_attention": attn(c, rope)}
    ff = mlp(c.intermediate_size)
    return [[branch] for kind in c.layers_block_type for branch in (mixers[kind], ff)]


def nemotron_h(c: Any) -> list[Layer]:
    scan = Branch("mamba2", dict(
        heads=c.mamba_num_heads, head_dim=c.mamba_head_dim, d_state=c.ssm_state_size, groups=c.n_groups,
        d_conv=c.conv_kernel, chunk=c.chunk_size, conv_bias=c.use_conv_bias, bias=c.mamba_proj_bias,
        gated_norm="after_gate", norm_eps=c.layer_norm_epsilon, norm_groups=c.n_groups, dt_limit=NO_LIMIT,
        dt_min=c.time_step_min, dt_max=c.time_step_max, dt_floor=c.time_step_floor,
    ))
    router = ("sigmoid", dict(
        bias=True, groups=c.n_group, top_groups=c.topk_group, renorm=c.norm_topk_prob,
        scale=c.routed_scaling_factor,
    ))
    layers = {
        MAMBA_KIND: scan,
        "full_attention": attn(c, "none"),
        "mlp": mlp(c.intermediate_size, act=c.mlp_hidden_act, gated=False, bias=c.mlp_bias),
        "moe": Branch("moe", dict(
            experts=c.n_routed_experts, top_k=c.num_experts_per_tok, d_ff=c.moe_intermediate_size,
            act=c.mlp_hidden_act, gated=False, router=router, latent=c.moe_latent_size, shared_gate="none",
            shared_d_ff=c.n_shared_experts * c.moe_shared_expert_intermediate_size,
        )),
    }
    return [[layers[kind]] for kind in c.layer_types]


def falcon_h1(c: Any) -> list[Layer]:
    gate, down = c.mlp_multipliers
    rope = ("rope", dict(theta=c.rope_parameters["rope_theta"], fraction=1, scaling="none"))
    side_by_side = [
        ssm2(
            c, c.rms_norm_eps, in_multiplier=c.ssm_in_multiplier, out_multiplier=c.ssm_out_multiplier,
            proj_multipliers=tuple(c.ssm_multipliers),
            gated_norm="after_gate" if c.mamba_rms_norm else "none",
        ),
        attn(
            c, rope, in_multiplier=c.attention_in_multiplier, out_multiplier=c.attention_out_multiplier,
            key_multiplier=c.key_multiplier,
        ),
    ]
    ff = mlp(c.intermediate_size, gate_multiplier=gate, out_multiplier=down)
    return [side_by_side, [ff]] * c.num_hidden_layers


def granite(c: Any) -> list[Layer]:
    scale = dict(out_multiplier=c.residual_multiplier)
    mixers = {
        MAMBA_KIND: ssm2(c, c.rms_norm_eps, **scale),
        "full_attention": attn(c, "none", scale=c.attention_multiplier, **scale),
    }
    if c.num_local_experts:
        ff = Branch("moe", dict(
            experts=c.num_local_experts, top_k=c.num_experts_per_tok, d_ff=c.intermediate_size, act="silu",
            gated=True, router=("softmax", dict(order="after_top_k", scale=1)), latent=None,
            shared_gate="none", shared_d_ff=c.shared_intermediate_size,
        ) | scale)
    else:
        ff = mlp(c.shared_intermediate_size, **scale)
    return [[branch] for kind in c.layer_types for branch in (mixers[kind], ff)]


def short_conv(c: Any) -> Branch:
    return Branch("short_conv", dict(
        d_inner=c.hidden_size, d_conv=c.conv_L_cache, bias=c.conv_bias, conv_bias=c.conv_bias,
    ))


def _lfm2_mixers(c: Any) -> list[Branch]:
    rope = ("rope", dict(theta=c.rope_parameters["rope_theta"], fraction=1, scaling="none"))
    attention = attn(c, rope, qk_norm=("per_head", dict(eps=c.norm_eps)))
    return [attention if kind == "full_attention" else short_conv(c) for kind in c.layer_types]


def lfm2(c: Any) -> list[Layer]:
    d_ff = c.intermediate_size
    if c.block_auto_adjust_ff_dim:
        d_ff = int(c.block_ffn_dim_multiplier * int(2 * d_ff / 3))
        d_ff = -(-d_ff // c.block_multiple_of) * c.block_multiple_of
    return [[branch] for mixer in _lfm2_mixers(c) for branch in (mixer, mlp(d_ff))]


def lfm2_moe(c: Any) -> list[Layer]:
    router = ("sigmoid", dict(
        bias=c.use_expert_bias, groups=1, renorm=c.norm_topk_prob, renorm_eps=1e-6, scale=c.routed_scaling_factor,
    ))
    experts = Branch("moe", dict(
        experts=c.num_experts, top_k=c.num_experts_per_tok, d_ff=c.moe_intermediate_size, act="silu", gated=True,
        router=router, shared_d_ff=0, latent=None,
    ))
    dense = mlp(c.intermediate_size)
    return [
        [branch] for i, mixer in enumerate(_lfm2_mixers(c))
        for branch in (mixer, dense if i < c.num_dense_layers else experts)
    ]


def lfm3(c: Any) -> list[Layer]:
    """Two kinds of attention, each with a rope of its own; norms before and behind each layer."""
    assert c.use_sandwich_norm and c.use_attention_gate
    turn = {"default": "rope", "proportional": "proportional"}
    mixers = {"conv": short_conv(c)}
    for kind, window in ("full_attention", None), ("sliding_attention", c.sliding_window):
        given = c.rope_parameters[kind]
        fields = dict(theta=given["rope_theta"], fraction=given.get("partial_rotary_factor", 1), scaling="none")
        mixers[kind] = attn(
            c, (turn[given["rope_type"]], fields), window=window, qk_norm=("per_head", dict(eps=c.norm_eps)),
            out_gate="per_head", qkv_bias=c.attention_bias,
        )
    ff = mlp(c.intermediate_size)
    return [Formed([branch], "sandwich") for kind in c.layer_types for branch in (mixers[kind], ff)]


def minimax(c: Any) -> list[Layer]:
    """Each layer's output is added to its normed input."""
    def normed(branch: Branch, which: str) -> Layer:
        alpha, beta = (getattr(c, f"{which}_{name}_factor") for name in ("alpha", "beta"))
        return Formed([branch], ("normed", dict(alpha=alpha, beta=beta)))

    given = c.rope_parameters
    rope = ("rope", dict(theta=given["rope_theta"], fraction=given["partial_rotary_factor"], scaling="none"))
    router = ("softmax", dict(order="before_top_k", renorm=True, renorm_eps=0, scale=1))
    experts = Branch("moe", dict(
        experts=c.num_local_experts, top_k=c.num_experts_per_tok, d_ff=c.intermediate_size, act="silu", gated=True,
        router=router, shared_d_ff=0, latent=None,
    ))
    mixers = {
        MAMBA_KIND: normed(Branch("lightning", dict(
            heads=c.num_attention_heads, head_dim=c.head_dim, chunk=c.block_size, norm_eps=1e-6,
        )), "linear_attn"),
        "full_attention": normed(attn(c, rope), "full_attn"),
    }
    return [layer for kind in c.layer_types for layer in (mixers[kind], normed(experts, "mlp"))]


def xlstm(c: Any) -> list[Layer]:
    assert not c.use_bias and c.weight_mode == "single"
    memory = Branch("mlstm", dict(
        heads=c.num_heads, key_dim=c.qk_head_dim, value_dim=c.v_head_dim, chunk=c.chunk_size,
        gate_softcap=c.gate_soft_cap, norm_eps=c.norm_eps, divisor_eps=c.eps,
    ))
    step = c.ffn_round_up_to_multiple_of
    ff = mlp(int((c.hidden_size * c.ffn_proj_factor + step - 1) // step * step))
    return [[memory], [ff]] * c.num_blocks


def rwkv(c: Any) -> list[Layer]:
    time = Branch("wkv4", dict(d_inner=c.attention_hidden_size))
    channel = Branch("channel_mix", dict(d_ff=c.intermediate_size))
    return [[time], [channel]] * c.num_hidden_layers


def zaya(c: Any) -> list[Layer]:
    assert not c.lm_head_bias and set(c.layer_types) == {"hybrid"}
    given = c.rope_parameters["hybrid"]
    attention = Branch("cca", dict(
        heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=c.head_dim, window=None,
        rope=("rope", dict(theta=given["rope_theta"], fraction=given["partial_rotary_factor"], scaling="none")),
        d_conv=c.cca_time0, d_head_conv=c.cca_time1, bias=c.attention_bias,
    ))

    def experts(carry: str) -> Branch:
        router = "mlp", dict(d_router=c.router_hidden_size, eps=c.rms_norm_eps, skip=True, carry=carry)
        return Branch("moe", dict(
            experts=c.num_experts, top_k=c.num_experts_per_tok, d_ff=c.moe_intermediate_size, act=c.hidden_act,
            gated=True, router=router, shared_d_ff=0, latent=None,
        ))

    carries = ["first"] + ["next"] * (c.num_hidden_layers - 1)
    return [Formed([branch], "affine") for carry in carries for branch in (attention, experts(carry))]


def olmo_hybrid(c: Any) -> list[Layer]:
    """Blocks with attention have their norms behind the layers."""
    assert c.rope_parameters["rope_theta"] is None
    delta = Branch("gated_delta_net", dict(
        heads=c.linear_num_value_heads, key_heads=c.linear_num_key_heads, key_dim=c.linear_key_head_dim,
        value_dim=c.linear_value_head_dim, d_conv=c.linear_conv_kernel_dim, conv_bias=False, norm_eps=1e-5,
        negative_eigenvalues=c.linear_allow_neg_eigval, dt_min=c.linear_dt_min, dt_max=c.linear_dt_max,
        dt_floor=c.linear_dt_init_floor,
    ))
    attention = attn(c, "none", qk_norm=("full_width", dict(eps=c.rms_norm_eps)))
    ff = mlp(c.intermediate_size)
    blocks = {MAMBA_KIND: [[delta], [ff]], "full_attention": [Formed([attention], "post"), Formed([ff], "post")]}
    return [layer for kind in c.layer_types for layer in blocks[kind]]


def qwen3_next(c: Any) -> list[Layer]:
    delta = Branch("gated_delta_net", dict(
        heads=c.linear_num_value_heads, key_heads=c.linear_num_key_heads, key_dim=c.linear_key_head_dim,
        value_dim=c.linear_value_head_dim, d_conv=c.linear_conv_kernel_dim, conv_bias=False,
        norm_eps=c.rms_norm_eps, negative_eigenvalues=False,
    ))
    given = c.rope_parameters
    attention = attn(
        c, ("rope", dict(theta=given["rope_theta"], fraction=given["partial_rotary_factor"], scaling="none")),
        qk_norm=("per_head", dict(eps=c.rms_norm_eps, zero_centered=True)), out_gate="elementwise",
    )
    mixers = {MAMBA_KIND: delta, "full_attention": attention}
    return [[branch] for kind in c.layer_types for branch in (mixers[kind], _qwen_feed_forward(c))]


def _qwen_feed_forward(c: Any) -> Branch:
    """Qwen3.5 has no say about layers without experts, nor whether shares are made to sum to 1: they are."""
    if not hasattr(c, "num_experts"):
        return mlp(c.intermediate_size)
    assert getattr(c, "decoder_sparse_step", 1) == 1 and not getattr(c, "mlp_only_layers", ())
    router = ("softmax", dict(
        order="before_top_k", renorm=getattr(c, "norm_topk_prob", True), renorm_eps=0, scale=1,
    ))
    return Branch("moe", dict(
        experts=c.num_experts, top_k=c.num_experts_per_tok, d_ff=c.moe_intermediate_size, act="silu", gated=True,
        router=router, shared_d_ff=c.shared_expert_intermediate_size, shared_gate="sigmoid", latent=None,
    ))


def kimi_delta(c: Any, **more: Any) -> Branch:
    return Branch("kimi_delta", dict(
        heads=c.linear_num_heads, key_dim=c.linear_head_dim, value_dim=c.linear_head_dim,
        d_conv=c.linear_conv_kernel_dim, conv_bias=False, norm_eps=c.rms_norm_eps, qk_eps=1e-6,
    ) | more)


def mla(c: Any, rope: Any, **more: Any) -> Branch:
    """The norms of latents have an eps of their own."""
    assert not c.attention_bias
    return Branch("mla", dict(
        heads=c.num_attention_heads, nope_dim=c.qk_nope_head_dim, rope_dim=c.qk_rope_head_dim,
        value_dim=c.v_head_dim, kv_rank=c.kv_lora_rank, rope=rope, scale=None, norm_eps=1e-6,
    ) | more)


def latent(c: Any, mixers: dict[str, Branch]) -> list[Layer]:
    """What Kimi Linear and Ling share: some dense blocks, then experts."""
    router = ("sigmoid", dict(
        bias=True, groups=c.n_group, top_groups=c.topk_group, renorm=c.norm_topk_prob, renorm_eps=1e-20,
        scale=c.routed_scaling_factor,
    ))
    experts = Branch("moe", dict(
        experts=c.num_local_experts, top_k=c.num_experts_per_tok, d_ff=c.moe_intermediate_size, act=c.hidden_act,
        gated=True, router=router, latent=None, shared_gate="none",
        shared_d_ff=c.n_shared_experts * c.moe_intermediate_size,
    ))
    feeds = {"dense": mlp(c.intermediate_size, act=c.hidden_act), "sparse": experts}
    return [
        [branch] for mixer, feed in zip(c.layer_types, c.mlp_layer_types, strict=True)
        for branch in (mixers[mixer], feeds[feed])
    ]


def kimi_linear(c: Any) -> list[Layer]:
    low = dict(decay="softplus", decay_rank=c.linear_head_dim, gate_rank=c.linear_head_dim)
    full = mla(c, "none", q_rank=c.q_lora_rank, out_gate="none")
    return latent(c, {MAMBA_KIND: kimi_delta(c, **low), "full_attention": full})


def bailing_hybrid(c: Any) -> list[Layer]:
    assert c.kda_safe_gate and c.rope_parameters["rope_type"] == "default"
    bounded = ("bounded", dict(lower_bound=c.kda_lower_bound))
    delta = kimi_delta(c, decay=bounded, decay_rank=None, gate_rank=None)
    rope = ("rope", dict(theta=c.rope_parameters["rope_theta"], pairs="interleaved", scaling="none"))
    return latent(c, {MAMBA_KIND: delta, "full_attention": mla(c, rope, q_rank=None, out_gate="per_head")})


def recurrent_gemma(c: Any) -> list[Layer]:
    given = c.rope_parameters
    act = {"gelu_pytorch_tanh": "gelu_tanh"}[c.hidden_activation]
    unit = Branch("rg_lru", dict(
        d_inner=c.lru_width, blocks=c.num_attention_heads, d_conv=c.conv1d_width, act=act, bias=True, conv_bias=True,
        sharpness=8,
    ))
    attention = attn(
        c, ("rope", dict(theta=given["rope_theta"], fraction=given["partial_rotary_factor"], scaling="none")),
        window=c.attention_window_size, o_bias=True,
    )
    mixers = {MAMBA_KIND: unit, "sliding_attention": attention}
    ff = mlp(c.intermediate_size // 2, act=act, bias=True)
    return [[branch] for kind in c.layers_block_type for branch in (mixers[kind], ff)]


def _zamba(c: Any, scan: Branch, rope: Any, attention: Any, mlp_adapter: Any) -> list[Layer]:
    block = attn(c, rope, scale=(c.attention_head_dim / 2) ** -0.5, adapter=attention)
    assert c.attention_hidden_size == 2 * c.hidden_size
    ff = mlp(c.intermediate_size, act=c.hidden_act, adapter=mlp_adapter)
    bridge = Branch("linear", dict(bias=False))
    hybrid = [Formed([block], "aside"), Formed([ff], "aside"), Formed([bridge], "aside"), [scan]]
    return [layer for kind in c.layers_block_type for layer in (hybrid if kind == "hybrid" else [[scan]])]


def zamba(c: Any) -> list[Layer]:
    scan = Branch("mamba1", dict(
        d_inner=c.mamba_expand * c.hidden_size, heads=c.n_mamba_heads, d_state=c.mamba_d_state, d_conv=c.mamba_d_conv,
        dt_rank=c.mamba_dt_rank, conv_bias=c.mamba_conv_bias, bias=c.mamba_proj_bias, dt_bc_norm="none",
        dt_min=c.time_step_min, dt_max=c.time_step_max, dt_floor=c.time_step_floor,
    ))
    return _zamba(c, scan, "none", "none", "none")


def zamba2(c: Any) -> list[Layer]:
    """Hugging Face holds dt above time_step_min in prompts, and not in decoding; the models were trained without."""
    scan = Branch("mamba2", dict(
        heads=c.n_mamba_heads, head_dim=c.mamba_headdim, d_state=c.mamba_d_state, groups=c.mamba_ngroups,
        d_conv=c.mamba_d_conv, chunk=c.chunk_size, conv_bias=c.use_conv_bias, bias=c.add_bias_linear,
        gated_norm="after_gate", norm_eps=1e-5, norm_groups=c.mamba_ngroups, dt_limit=NO_LIMIT, dt_min=c.time_step_min,
        dt_max=c.time_step_max, dt_floor=c.time_step_floor,
    ))
    rope = ("rope", dict(theta=c.rope_parameters["rope_theta"], fraction=1, scaling="none"))
    lora = dict(rank=c.adapter_rank)
    attention = ("lora", dict(targets=("qkv_proj",), per="segment", **lora))
    return _zamba(
        c, scan, rope if c.use_mem_rope else "none", attention if c.use_shared_attention_adapter else "none",
        ("lora", dict(targets=("up_proj",), per="projection", **lora)),
    )


def samba(c: Any) -> list[Layer]:
    scan = Branch("mamba1", dict(
        d_inner=2 * c.n_embd, d_state=16, d_conv=4, dt_rank=c.n_embd // 16, bias=False, conv_bias=True,
        dt_bc_norm="none",
    ))
    window = Branch("attention", dict(
        heads=c.n_head, kv_heads=c.n_head, head_dim=c.n_embd // c.n_head, window=c.local_window,
        qkv_bias=False, o_bias=False, rope=("rope", dict(theta=10000, fraction=c.rotary_percentage)),
    ))
    mixers = [scan if i % c.mb_per_layer == 0 else window for i in range(c.n_layer)]
    return [[branch] for mixer in mixers for branch in (mixer, mlp(c.intermediate_size))]


def phi_4_flash(c: Any) -> list[Layer]:
    """The middle layer and the one after it give what the upper half reads."""
    half, inner, layers = c.num_hidden_layers // 2, c.mamba_expand * c.hidden_size, []
    for i in range(c.num_hidden_layers):
        upper = i > half + 1
        if i % c.mb_per_layer:
            layers.append(Branch("attention", dict(
                heads=c.num_attention_heads, kv_heads=c.num_key_value_heads,
                head_dim=c.hidden_size // c.num_attention_heads, window=c.sliding_window if i < half else None,
                rope="none", differential=("halves", dict(eps=1e-5, weight=True)), qkv_bias=True, o_bias=True,
                takes="kv" if upper else "none", gives="kv" if i == half + 1 else "none",
            )))
        elif upper:
            layers.append(Branch("gmu", dict(d_inner=inner, act="silu", bias=False)))
        else:
            layers.append(Branch("mamba1", dict(
                d_inner=inner, d_state=c.mamba_d_state, d_conv=c.mamba_d_conv, dt_rank=c.mamba_dt_rank, bias=False,
                conv_bias=True, dt_bc_norm="none", heads=1, gives="scan" if i == half else "none",
            )))
    return [[branch] for mixer in layers for branch in (mixer, mlp(c.intermediate_size))]


FAMILIES = {
    "Mamba": mamba, "Mamba2": mamba2, "FalconMamba": falcon_mamba, "Jamba": jamba, "Bamba": bamba,
    "NemotronH": nemotron_h, "FalconH1": falcon_h1, "GraniteMoeHybrid": granite, "Lfm2": lfm2,
    "Lfm2Moe": lfm2_moe, "Lfm3": lfm3, "MiniMax": minimax, "Qwen3_5": qwen3_next, "Qwen3_5Moe": qwen3_next,
    "OlmoHybrid": olmo_hybrid, "Qwen3Next": qwen3_next, "KimiLinear": kimi_linear, "BailingHybrid": bailing_hybrid,
    "RecurrentGemma": recurrent_gemma, "Zamba": zamba, "Zamba2": zamba2, "Samba": samba,
    "xLSTM": xlstm, "Rwkv": rwkv, "Zaya": zaya, "Phi4Flash": phi_4_flash,
}


#: The scale of their norms is 1 + weight.
ZERO_CENTERED = "Qwen3Next", "Qwen3_5", "Qwen3_5Moe", "RecurrentGemma"


def embedding_multiplier(c: Any) -> float:
    """RecurrentGemma's is a buffer of bfloat16."""
    if c.model_type == "recurrent_gemma":
        return torch.tensor(c.hidden_size**0.5, dtype=torch.bfloat16).item()
    return getattr(c, "embedding_multiplier", 1)


def settings(name: str) -> dict[str, Any]:
    c = config(name)
    if CONFIGS[name][0] == "Samba":
        return dict(
            vocab=c.vocab_size, d_model=c.n_embd, norm=("rmsnorm", dict(eps=c.norm_eps)), tie_embeddings=True,
            context=c.block_size, residual_dtype="fp32",
        )
    if CONFIGS[name][0] == "Phi4Flash":
        return dict(
            vocab=c.vocab_size, d_model=c.hidden_size, tie_embeddings=c.tie_word_embeddings, residual_dtype="fp32",
            norm=("layernorm", dict(eps=c.layer_norm_eps, weight=True, bias=True)),
        )
    eps = next(getattr(c, name) for name in ("rms_norm_eps", "norm_eps", "layer_norm_epsilon") if hasattr(c, name))
    centered = dict(weight=True, zero_centered=CONFIGS[name][0] in ZERO_CENTERED)
    layer_norm = "layernorm", dict(eps=eps, weight=True, bias=True)
    found = dict(
        vocab=c.vocab_size, d_model=c.hidden_size, tie_embeddings=c.tie_word_embeddings,
        norm=layer_norm if c.model_type == "rwkv" else ("rmsnorm", dict(eps=eps) | centered),
        embedding_norm={"rwkv": layer_norm, "zaya": "affine"}.get(c.model_type, "none"),
        logits_softcap=getattr(c, "logits_soft_cap", getattr(c, "output_logit_soft_cap", None)),
        residual_dtype="fp32" if getattr(c, "residual_in_fp32", c.model_type == "zaya") else "model",
        embedding_multiplier=embedding_multiplier(c),
        logits_multiplier=getattr(c, "lm_head_multiplier", 1) / getattr(c, "logits_scaling", 1),
    )
    return found | (dict(context=c.max_position_embeddings) if hasattr(c, "max_position_embeddings") else {})


def same(value: Any, expected: Any) -> bool:
    """A form is equal to its name, or to (name, some of its fields); numbers to the last bits."""
    if isinstance(value, Variant):
        name, fields = (expected, {}) if isinstance(expected, str) else expected
        return value.name == name and all(same(getattr(value, k), v) for k, v in fields.items())
    if isinstance(expected, bool) or not isinstance(expected, (int, float, tuple)):
        return value == expected and isinstance(value, bool) == isinstance(expected, bool)
    if isinstance(expected, tuple) and not all(isinstance(item, (int, float)) for item in expected):
        return value == expected
    return value is not None and value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings(name):
    model = load(MODELS / f"{name}.mdl").layers.model
    wrong = {k: (model[k], v) for k, v in settings(name).items() if not same(model[k], v)}
    assert not wrong


@pytest.mark.parametrize("name", CONFIGS)
def test_layers(name):
    family, _ = CONFIGS[name]
    expected = FAMILIES[family](config(name))
    found = [node.layer for node in load(MODELS / f"{name}.mdl").layers.layers]
    kinds = [[b.kind for b in layer.branches] for layer in found]
    assert kinds == [[b.kind for b in layer] for layer in expected]
    for place, (layer, branches) in enumerate(zip(found, expected, strict=True)):
        assert same(layer.sub.residual, getattr(branches, "form", "pre"))
        for mixer, branch in zip(layer.branches, branches, strict=True):
            values = {**mixer.fields, **mixer.branch}
            free = dict(in_multiplier=1, out_multiplier=1, dropout=0, adapter="none")
            wanted = free | branch.fields
            wrong = {k: (values[k], v) for k, v in wanted.items() if not same(values[k], v)}
            assert not wrong, f"{name} stack.{place} {mixer.kind}"


@pytest.mark.parametrize("name", [
    "mamba_130m", "mamba2_130m", "falcon_h1_0_5b", "granite_4_0_h_micro", "lfm2_350m", "lfm2_8b_a1b", "zamba_7b_v1",
    "zamba2_1_2b", "zamba2_2_7b", "zamba2_7b", "zaya1_8b",
])
def test_hugging_face_counts_the_same_parameters(name):
    assert load(MODELS / f"{name}.mdl").cost().params == hugging_face_params(name)


@pytest.mark.parametrize("name", [name for name, (family, _) in CONFIGS.items() if family in ("Zamba", "Zamba2")])
def test_shared_blocks_of_zamba_are_used_in_turn(name):
    c, layers = config(name), load(MODELS / f"{name}.mdl").layers.layers
    blocks = [(a.owner, b.owner) for a, b in zip(layers, layers[1:]) if a.layer.branches[0].kind == "attention"]
    names = [f"shared.{'TU'[i % getattr(c, 'num_mem_blocks', 1)]}" for i in range(c.layers_block_type.count("hybrid"))]
    assert blocks == [(f"{name}.0", f"{name}.1") for name in names]
    for node in layers:
        kind, sub = node.layer.branches[0].kind, node.layer.sub
        assert sub.input == ("with_embedding" if kind == "attention" else "stream")
        assert sub.norm.name == ("none" if kind == "linear" else "rmsnorm")
