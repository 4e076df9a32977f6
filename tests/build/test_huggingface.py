"""Whole models against Hugging Face's classes: tiny configurations, random weights mapped name by name.

Protocol: float32, eager experts, every parameter moved off its initial value, one full forward pass without
cache. Two quirks of those classes are met here: Nemotron-H clamps dt at 0.001 from below whatever its
configuration says, and Bamba rotates half of each head unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from mambadsl.build.model import build
from mambadsl.graph.graph import Role
from mambadsl.graph.unroll import unroll
from mambadsl.kinds.residual import AFFINE_TERMS
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.source import from_text

transformers = pytest.importorskip("transformers")

COMMON = dict(vocab_size=61, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EPS = "norm = rmsnorm(eps=1e-5)"
LIMIT = 5e-5


@dataclass(frozen=True)
class Family:
    """config: of `<name>Config`. text: the same model in our language. layers: for each of our layers,
    (norm, mixer, mixer of a second branch, ...) as paths of theirs; embed, norm, layer: their prefixes. after: prefix
    of the norm behind a layer, beside the one before it. apart: takes their weights that hold several of ours in an
    order of their own, and gives them one by one. tail: the number of their layer that holds the first depth of
    `mtp`."""

    name: str
    config: dict
    text: str
    layers: list[tuple[str | None, ...]]
    embed: str = "model.embed_tokens"
    embed_norm: str = ""
    final: str = "model.final_layernorm"
    head: str = "lm_head"
    base: str = "model.layers"
    model: str = ""
    tied: bool = field(default=False)
    after: str = ""
    apart: Callable[[dict], dict] = lambda weights: weights
    tail: int = 0

    def program(self) -> str:
        tied = "true" if self.tied else "false"
        fixed = f"model them {{ vocab = 61\n d_model = 32\n tie_embeddings = {tied}\n {self.model} }}\n"
        return fixed + self.text


def each(count: int, *pairs: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The same places in `count` layers."""
    return [tuple(f"{i}.{name}" for name in pair) for i in range(count) for pair in pairs]


def pairs(mixers: list[str], before: str, feed_forward: str) -> list[tuple[str, ...]]:
    """Layers of a mixer and a feed-forward sublayer, each with its norm."""
    return [
        pair for i, mixer in enumerate(mixers)
        for pair in ((f"{i}.input_layernorm", f"{i}.{mixer}"), (f"{i}.{before}", f"{i}{feed_forward}"))
    ]


def lfm2(mixers: list[str]) -> list[tuple[str, ...]]:
    return [
        pair for i, mixer in enumerate(mixers)
        for pair in ((f"{i}.operator_norm", f"{i}.{mixer}"), (f"{i}.ffn_norm", f"{i}.feed_forward"))
    ]


DELTA = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=12,
    num_hidden_layers=4, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=False,
    rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25),
)
QWEN_EXPERTS = dict(
    moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=6, num_experts_per_tok=3,
)
QWEN_LAYERS = """
layer D = gated_delta_net(heads=4, key_heads=2, key_dim=8, value_dim=12)
layer A = attention(
  heads=4, kv_heads=2, head_dim=16, rope=rope(theta=10_000_000, fraction=0.25),
  qk_norm=per_head(eps=1e-6, zero_centered=true), out_gate=elementwise)
layer E = moe(
  experts=6, top_k=3, d_ff=24, gated=true, router=softmax(renorm=true), shared_d_ff=20, shared_gate=sigmoid)
layer F = mlp(d_ff=48, gated=true)
"""


def qwen_apart(weights: dict) -> dict:
    """Queries with their gates, and q, k, v, z, b and a of each key head, lie side by side."""
    found = {}
    for name, w in weights.items():
        path, _, last = name.rpartition("linear_attn.")
        attention, _, projection = name.rpartition("self_attn.")
        if last == "in_proj_qkvz.weight":
            names, parts = "qkvg", w.unflatten(0, (2, -1)).split([8, 8, 24, 24], 1)
        elif last == "in_proj_ba.weight":
            names, parts = "ba", w.unflatten(0, (2, -1)).split([2, 2], 1)
        elif projection == "q_proj.weight":
            q, gate = w.unflatten(0, (4, -1)).split([16, 16], 1)
            found |= {name: q.flatten(0, 1), f"{attention}self_attn.gate_proj.weight": gate.flatten(0, 1)}
            continue
        else:
            found[name] = w
            continue
        found |= {f"{path}linear_attn.{n}_proj.weight": t.flatten(0, 1) for n, t in zip(names, parts)}
    return found


def griffin_apart(weights: dict) -> dict:
    """Their gates multiply rows."""
    found = {}
    for name, w in weights.items():
        if name.endswith("gate_weight"):
            found[name] = w.transpose(1, 2)
        else:
            found[name] = w.flatten() if name.endswith("gate_bias") else w
    return found


def rwkv_apart(weights: dict) -> dict:
    """Shares of the token shift have axes to spare; both mixers have a key, a value and a receptance."""
    ours = {"attention": dict(key="k_proj", value="v_proj", output="out_proj"),
            "feed_forward": dict(key="up_proj", value="down_proj")}
    found = {}
    for name, w in weights.items():
        *path, leaf = name.split(".")
        mixer = ours.get(path[-2]) if len(path) > 1 else None
        if mixer:
            path[-1] = {**mixer, "receptance": "r_proj"}[path[-1]]
        if leaf.startswith("time_mix_"):
            leaf = f"mix_{leaf.removeprefix('time_mix_')[0]}"
        found[".".join((*path, leaf))] = w.flatten() if leaf.startswith("mix_") else w
    return found


#: Parts of Zaya's names -> those that `moved` finds.
ZAYA = {
    "model.input_hidden_states_scale": "model.embed_affine.weight",
    "model.input_hidden_states_bias": "model.embed_affine.bias",
    "post_attention_residual_scale.": "input_layernorm.", "post_mlp_residual_scale.": "post_attention_layernorm.",
    ".hidden_states_scale": ".residual.out_affine.weight", ".hidden_states_bias": ".residual.out_affine.bias",
    ".residual_scale": ".residual.stream_affine.weight", ".residual_bias": ".residual.stream_affine.bias",
    "self_attn.qkv_proj.": "self_attn.", "v_proj_current": "v_proj", "v_proj_delayed": "v_next_proj",
    "conv_qk_depthwise": "conv", "conv_qk_grouped": "head_conv", "qk_norm.temp": "temperature",
    "gate.down_proj": "router.enter", "gate.router_mlp.out_proj": "router", "gate.router_mlp": "router",
    "gate.balancing_biases": "router.bias", "gate.router_states_scale": "router.carry_scale",
}


def zaya_apart(weights: dict) -> dict:
    """Theirs under other names; a matrix for each tap and head."""
    found = {}
    for name, w in weights.items():
        for their, our in ZAYA.items():
            name = name.replace(their, our)
        found[name] = w.unflatten(0, (-1, w.shape[1])) if name.endswith("head_conv.weight") else w
    return found


def latent_apart(weights: dict) -> dict:
    """Keys and values of each head lie side by side; a rate of decay for each head has axes to spare."""
    found = {}
    for name, w in weights.items():
        path, _, last = name.rpartition("self_attn.")
        if last == "kv_b_proj.weight":
            k, v = w.unflatten(0, (4, -1)).split([12, 10], 1)
            found |= {f"{path}self_attn.{n}_b_proj.weight": t.flatten(0, 1) for n, t in (("k", k), ("v", v))}
        else:
            found[name] = w.flatten() if last == "forget_gate.A_log" else w
    return found


MLA = dict(
    intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=12, v_head_dim=10, tie_word_embeddings=False,
)
KIMI = dict(MLA, linear_head_dim=8, linear_num_heads=4, rms_norm_eps=1e-5)
EXPERTS = dict(moe_intermediate_size=24, num_local_experts=8, num_experts_per_tok=3)
LING_LAYERS = """
layer K = kimi_delta(heads=4, value_dim=8, decay=bounded(lower_bound=-5), decay_rank=full, gate_rank=full)
layer L = mla(
  heads=4, nope_dim=12, rope_dim=8, value_dim=10, kv_rank=16, rope=rope(theta=6_000_000, pairs=interleaved),
  out_gate=per_head)
layer F = mlp(d_ff=48, gated=true)
layer E = moe(
  experts=8, top_k=3, d_ff=24, gated=true, shared_d_ff=24, router=sigmoid(groups=2, top_groups=1, scale=2.5))
"""


def zamba_apart(weights: dict) -> dict:
    """Rows of in_proj are x and z in turn, heads of the scan are an axis; a tied factor of an adapter is in the list of
    every use, of which each has one, numbered by use."""
    uses: dict[str, int] = {}
    found = {}
    for name, w in weights.items():
        path, _, last = name.rpartition("mamba.")
        if f"{path}mamba.x_proj_weight" in weights:
            if last == "in_proj.weight":
                w = torch.cat([w[0::2], w[1::2]])
            elif last in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"):
                w = w.flatten(0, 1)
        if "adapter_list" in name:
            before, _, after = name.partition("_adapter_list.")
            use = uses.setdefault(name.split(".shared_")[0], len(uses))
            number, factor, _ = after.split(".")
            if int(number) != use:
                continue
            name = f"{before}_adapter.{('down', 'up')[int(factor)]}"
        found[name] = w
    return found


def zamba(hybrids: list[bool], block: str) -> list[tuple[str | None, ...]]:
    """Their layers: a Mamba alone, or a shared block and a projection aside of it."""
    found: list[tuple[str | None, ...]] = []
    for i, hybrid in enumerate(hybrids):
        if hybrid:
            found += [(f"{i}.{block}.input_layernorm", f"{i}.{block}.self_attn")]
            found += [(f"{i}.{block}.pre_ff_layernorm", f"{i}.{block}.feed_forward"), (None, f"{i}.linear")]
        at = f"{i}.mamba_decoder" if hybrid else f"{i}"
        found.append((f"{at}.input_layernorm", f"{at}.mamba"))
    return found


def zamba_kinds(hybrids: list[bool]) -> list[str]:
    return ["hybrid" if hybrid else "linear_attention" for hybrid in hybrids]


ZAMBA = [False, True, False, True]
ZAMBA2 = [False, True, False, True, False, True]
ZAMBA2_BLOCKS = [False, True, False, True, True, True]
ZAMBA2_CONFIG = dict(
    intermediate_size=48, num_hidden_layers=6, mamba_d_state=8, n_mamba_heads=8, chunk_size=8, num_attention_heads=4,
    num_key_value_heads=4, adapter_rank=4, tie_word_embeddings=True,
)


def minimax_apart(weights: dict) -> dict:
    """q, k and v of each head lie side by side; what follows from the slopes is stored beside them."""
    found = {}
    for name, w in weights.items():
        if name.endswith("qkv_proj.weight"):
            parts = w.unflatten(0, (4, 3, -1)).unbind(1)
            found |= {name.replace("qkv_", f"{n}_"): t.flatten(0, 1) for n, t in zip("qkv", parts)}
        elif not name.endswith(MINIMAX_DECAYS):
            found[name] = w.flatten() if name.endswith("slope_rate") else w
    return found


MINIMAX_DECAYS = "query_decay", "key_decay", "diagonal_decay"
#: Tensors in a state dict that weights say nothing about.
CONSTANTS = "slope_rate", *MINIMAX_DECAYS
QWEN_MIXERS = ["linear_attn"] * 3 + ["self_attn"]
GROUPED = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2,
    mamba_chunk_size=8,
)
NEMOTRON = dict(
    head_dim=16, intermediate_size=48, ssm_state_size=16, mamba_num_heads=4, mamba_head_dim=12, n_groups=2,
    conv_kernel=4, chunk_size=8, layer_norm_epsilon=1e-5, tie_word_embeddings=False,
)
NEMOTRON_LAYERS = """
layer M = mamba2(heads=4, head_dim=12, d_state=16, groups=2, dt_limit=[0.001, inf], chunk=8)
layer A = attention(heads=4, kv_heads=2, head_dim=16, rope=none)
layer F = mlp(d_ff=48, act=relu2)
layer E = moe(experts=8, top_k=3, d_ff=24, shared_d_ff=40, act=relu2, router=sigmoid(groups=2, scale=2.5))
"""
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2)
BACKBONE = dict(embed="backbone.embeddings", final="backbone.norm_f", base="backbone.layers")

FAMILIES = {
    "mamba": Family(
        "Mamba",
        dict(num_hidden_layers=3, state_size=8, expand=2, time_step_rank=3, tie_word_embeddings=True),
        "layer R = mamba1(d_inner=64, d_state=8, dt_rank=3)\nstack { R R R }",
        each(3, ("norm", "mixer")), **BACKBONE, model=f"{EPS}\n residual_dtype = fp32", tied=True,
    ),
    "falcon_mamba": Family(
        "FalconMamba",
        dict(
            num_hidden_layers=2, state_size=8, expand=2, time_step_rank=3, use_bias=True, mixer_rms_eps=1e-6,
            tie_word_embeddings=False,
        ),
        """
        layer R = mamba1(d_inner=64, d_state=8, dt_rank=3, bias=true, dt_bc_norm=weightless(eps=1e-6))
        stack { R R }
        """,
        each(2, ("norm", "mixer")), **BACKBONE, model=EPS,
    ),
    "mamba2": Family(
        "Mamba2",
        dict(
            num_hidden_layers=3, num_heads=8, head_dim=8, state_size=16, n_groups=4, use_bias=True, expand=2,
            conv_kernel=4, chunk_size=8, tie_word_embeddings=False,
        ),
        "layer M = mamba2(heads=8, head_dim=8, d_state=16, groups=4, bias=true, chunk=8)\nstack { M*3 }",
        each(3, ("norm", "mixer")), **BACKBONE, model=EPS,
    ),
    "nemotron_h": Family(
        "NemotronH",
        dict(
            layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
            **NEMOTRON, **ATTENTION,
        ),
        NEMOTRON_LAYERS + "stack { [M F] M A F }",
        each(5, ("norm", "mixer")), embed="model.embeddings", final="model.norm_f", model=EPS,
    ),
    "nemotron_h with experts": Family(
        "NemotronH",
        dict(
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"], n_routed_experts=8,
            num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=24, routed_scaling_factor=2.5,
            moe_shared_expert_intermediate_size=40, n_group=2, topk_group=1, norm_topk_prob=True,
            **NEMOTRON, **ATTENTION,
        ),
        NEMOTRON_LAYERS + "stack { M E A E }",
        each(4, ("norm", "mixer")), embed="model.embeddings", final="model.norm_f", model=EPS,
    ),
    "jamba": Family(
        "Jamba",
        dict(
            intermediate_size=48, num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2,
            expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2,
            mamba_d_state=8, mamba_dt_rank=3, rms_norm_eps=1e-6, tie_word_embeddings=False, **ATTENTION,
        ),
        """
        layer R = mamba1(d_inner=64, d_state=8, dt_rank=3, dt_bc_norm=learned(eps=1e-6))
        layer A = attention(heads=4, kv_heads=2)
        layer F = mlp(d_ff=48, gated=true)
        layer E = moe(experts=4, top_k=2, d_ff=48, gated=true)
        stack { R F R E A F R E }
        """,
        pairs(["mamba", "mamba", "self_attn", "mamba"], "pre_ff_layernorm", ".feed_forward"),
        model="norm = rmsnorm(eps=1e-6)",
    ),
    "bamba": Family(
        "Bamba",
        dict(
            intermediate_size=48, num_hidden_layers=3, attn_layer_indices=[1], tie_word_embeddings=False,
            **ATTENTION, **GROUPED,
        ),
        """
        layer M = mamba2(heads=8, head_dim=8, d_state=16, groups=2, chunk=8)
        layer A = attention(heads=4, kv_heads=2, rope=rope(theta=10000, fraction=0.5))
        layer F = mlp(d_ff=48, gated=true)
        stack { M F A F M F }
        """,
        pairs(["mamba", "self_attn", "mamba"], "pre_ff_layernorm", ".feed_forward"),
        model=EPS,
    ),
    "falcon_h1": Family(
        "FalconH1",
        dict(
            intermediate_size=48, num_hidden_layers=2, head_dim=16, mamba_d_ssm=48, mamba_n_heads=6,
            mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8, mamba_rms_norm=False,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=1e6), key_multiplier=0.35,
            attention_in_multiplier=1.1, attention_out_multiplier=0.9, embedding_multiplier=5.5,
            lm_head_multiplier=0.25, mlp_multipliers=[0.875, 0.5], ssm_in_multiplier=1.25,
            ssm_out_multiplier=0.75, ssm_multipliers=[0.35, 0.25, 0.75, 0.5, 0.375],
            tie_word_embeddings=False, **ATTENTION,
        ),
        """
        layer M = mamba2(
          heads=6, head_dim=8, d_state=16, chunk=8, gated_norm=none,
          proj_multipliers=[0.35, 0.25, 0.75, 0.5, 0.375], in_multiplier=1.25, out_multiplier=0.75)
        layer A = attention(
          heads=4, kv_heads=2, head_dim=16, rope=rope(theta=1000000), key_multiplier=0.35,
          in_multiplier=1.1, out_multiplier=0.9)
        layer F = mlp(d_ff=48, gated=true, gate_multiplier=0.875, out_multiplier=0.5)
        stack { [M+A F]*2 }
        """,
        each(2, ("input_layernorm", "mamba", "self_attn"), ("pre_ff_layernorm", "feed_forward")),
        model=f"{EPS}\n embedding_multiplier = 5.5\n logits_multiplier = 0.25",
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybrid",
        dict(
            intermediate_size=24, shared_intermediate_size=40, num_hidden_layers=3, num_local_experts=6,
            num_experts_per_tok=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
            position_embedding_type=None, embedding_multiplier=12.0, attention_multiplier=0.125,
            residual_multiplier=0.22, logits_scaling=8.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
            **ATTENTION, **GROUPED,
        ),
        """
        layer M = mamba2(
          heads=8, head_dim=8, d_state=16, groups=2, chunk=8, out_multiplier=0.22, norm_eps=1e-6)
        layer A = attention(heads=4, kv_heads=2, rope=none, scale=0.125, out_multiplier=0.22)
        layer E = moe(
          experts=6, top_k=3, d_ff=24, gated=true, shared_d_ff=40, router=softmax(order=after_top_k),
          out_multiplier=0.22)
        stack { M E A E M E }
        """,
        pairs(["mamba", "self_attn", "mamba"], "post_attention_layernorm", ""),
        final="model.norm", tied=True,
        model="norm = rmsnorm(eps=1e-6)\n embedding_multiplier = 12\n logits_multiplier = 1 / 8",
    ),
    "lfm2": Family(
        "Lfm2",
        dict(
            intermediate_size=48, num_hidden_layers=4, conv_L_cache=3, norm_eps=1e-5, block_multiple_of=8,
            layer_types=["conv", "full_attention", "conv", "full_attention"], **ATTENTION,
        ),
        """
        layer C = short_conv(d_conv=3)
        layer A = attention(heads=4, kv_heads=2, rope=rope(theta=1_000_000), qk_norm=per_head(eps=1e-5))
        layer F = mlp(d_ff=32, gated=true)
        stack { [C F A F]*2 }
        """,
        lfm2(["conv", "self_attn", "conv", "self_attn"]), final="model.embedding_norm", tied=True, model=EPS,
    ),
    "lfm2 with experts": Family(
        "Lfm2Moe",
        dict(
            intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=4, conv_L_cache=3, norm_eps=1e-5,
            layer_types=["conv", "conv", "full_attention", "conv"], num_dense_layers=2, num_experts=6,
            num_experts_per_tok=2, conv_bias=True, routed_scaling_factor=1.5, **ATTENTION,
        ),
        """
        layer C = short_conv(d_conv=3, bias=true, conv_bias=true)
        layer A = attention(heads=4, kv_heads=2, rope=rope(theta=1_000_000), qk_norm=per_head(eps=1e-5))
        layer F = mlp(d_ff=48, gated=true)
        layer E = moe(experts=6, top_k=2, d_ff=24, gated=true, router=sigmoid(renorm_eps=1e-6, scale=1.5))
        stack { [C F]*2 A E C E }
        """,
        lfm2(["conv", "conv", "self_attn", "conv"]), final="model.embedding_norm", tied=True, model=EPS,
    ),
    "lfm3": Family(
        "Lfm3",
        dict(intermediate_size=48, num_hidden_layers=5, head_dim=16, conv_L_cache=7, sliding_window=6, **ATTENTION),
        """
        layer C = short_conv(d_conv=7, residual=sandwich)
        layer A = attention(
          heads=4, kv_heads=2, head_dim=16, rope=proportional(theta=1_000_000, fraction=0.5),
          qk_norm=per_head(eps=1e-5), out_gate=per_head, residual=sandwich)
        layer W = A(window=6, rope=rope(theta=10_000))
        layer F = mlp(d_ff=48, gated=true, residual=sandwich)
        stack { [C F]*2 A F C F W F }
        """,
        lfm2(["conv", "conv", "self_attn", "conv", "self_attn"]), final="model.embedding_norm", tied=True, model=EPS,
        after="post_",
    ),
    "olmo_hybrid": Family(
        "OlmoHybrid",
        dict(
            intermediate_size=48, num_hidden_layers=3, rms_norm_eps=1e-6, tie_word_embeddings=False,
            linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
            layer_types=["linear_attention", "full_attention", "linear_attention"], linear_allow_neg_eigval=True,
            rope_parameters=dict(rope_theta=None, rope_type="default"), **ATTENTION,
        ),
        """
        layer D = gated_delta_net(heads=4, key_dim=8, value_dim=12, negative_eigenvalues=true, norm_eps=1e-5)
        layer A = attention(heads=4, kv_heads=2, rope=none, qk_norm=full_width(eps=1e-6), residual=post)
        layer F = mlp(d_ff=48, gated=true)
        layer G = F(residual=post)
        stack { D F A G D F }
        """,
        [
            ("0.input_layernorm", "0.linear_attn"), ("0.post_attention_layernorm", "0.mlp"),
            ("1.post_attention_layernorm", "1.self_attn"), ("1.post_feedforward_layernorm", "1.mlp"),
            ("2.input_layernorm", "2.linear_attn"), ("2.post_attention_layernorm", "2.mlp"),
        ],
        final="model.norm", model="norm = rmsnorm(eps=1e-6)",
    ),
    "qwen3_next": Family(
        "Qwen3Next", dict(intermediate_size=48, mlp_only_layers=[1], **DELTA, **QWEN_EXPERTS, **ATTENTION),
        QWEN_LAYERS + "stack { D E D F D E A E }",
        pairs(QWEN_MIXERS, "post_attention_layernorm", ".mlp"), final="model.norm",
        model="norm = rmsnorm(eps=1e-6, zero_centered=true)", apart=qwen_apart,
    ),
    "qwen3_5": Family(
        "Qwen3_5", dict(intermediate_size=48, config_class="Qwen3_5TextConfig", **DELTA, **ATTENTION),
        QWEN_LAYERS + "stack { [D F]*3 A F }",
        pairs(QWEN_MIXERS, "post_attention_layernorm", ".mlp"), final="model.norm",
        model="norm = rmsnorm(eps=1e-6, zero_centered=true)", apart=qwen_apart,
    ),
    "qwen3_5 with experts": Family(
        "Qwen3_5Moe", dict(config_class="Qwen3_5MoeTextConfig", **DELTA, **QWEN_EXPERTS, **ATTENTION),
        QWEN_LAYERS + "stack { [D E]*3 A E }",
        pairs(QWEN_MIXERS, "post_attention_layernorm", ".mlp"), final="model.norm",
        model="norm = rmsnorm(eps=1e-6, zero_centered=true)", apart=qwen_apart,
    ),
    "kimi_linear": Family(
        "KimiLinear",
        dict(
            **KIMI, **EXPERTS, num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"],
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"], n_group=1, topk_group=1,
            routed_scaling_factor=2.446,
        ),
        """
        layer K = kimi_delta(heads=4, value_dim=8, norm_eps=1e-5)
        layer L = mla(heads=4, nope_dim=12, rope_dim=8, value_dim=10, kv_rank=16)
        layer F = mlp(d_ff=48, gated=true)
        layer E = moe(experts=8, top_k=3, d_ff=24, gated=true, shared_d_ff=24, router=sigmoid(scale=2.446))
        stack { K F [K E]*2 L E }
        """,
        pairs(["self_attn"] * 4, "post_attention_layernorm", ".mlp"), final="model.norm", model=EPS, apart=latent_apart,
    ),
    "kimi_linear, a latent of queries, groups of experts": Family(
        "KimiLinear",
        dict(
            **KIMI, **EXPERTS, num_hidden_layers=3,
            layer_types=["full_attention", "linear_attention", "full_attention"],
            mlp_layer_types=["sparse", "sparse", "dense"], n_group=4, topk_group=2, q_lora_rank=14,
            n_shared_experts=2, moe_renormalize=False, linear_conv_kernel_dim=3,
        ),
        """
        layer K = kimi_delta(heads=4, value_dim=8, d_conv=3, norm_eps=1e-5)
        layer L = mla(heads=4, nope_dim=12, rope_dim=8, value_dim=10, kv_rank=16, q_rank=14)
        layer F = mlp(d_ff=48, gated=true)
        layer E = moe(
          experts=8, top_k=3, d_ff=24, gated=true, shared_d_ff=48,
          router=sigmoid(groups=4, top_groups=2, renorm=false, scale=2.446))
        stack { L E K E L F }
        """,
        pairs(["self_attn"] * 3, "post_attention_layernorm", ".mlp"), final="model.norm", model=EPS, apart=latent_apart,
    ),
    "bailing_hybrid": Family(
        "BailingHybrid",
        dict(
            **MLA, **EXPERTS, num_hidden_layers=4, head_dim=8, layer_group_size=2, first_k_dense_replace=1, n_group=2,
            topk_group=1, num_mtp_layers=0,
        ),
        LING_LAYERS + "stack { K F L E K E L E }",
        pairs(["self_attn"] * 4, "post_attention_layernorm", ".mlp"), final="model.norm",
        model="norm = rmsnorm(eps=1e-6)", apart=latent_apart,
    ),
    "bailing_hybrid, decays without a bound": Family(
        "BailingHybrid",
        dict(
            **MLA, **EXPERTS, num_hidden_layers=3, head_dim=8, layer_group_size=3, first_k_dense_replace=0, n_group=2,
            topk_group=1, num_mtp_layers=0, kda_safe_gate=False, rms_norm_eps=1e-5,
        ),
        LING_LAYERS + """
        layer S = K(decay=softplus, norm_eps=1e-5)
        stack { [S E]*2 L E }
        """,
        pairs(["self_attn"] * 3, "post_attention_layernorm", ".mlp"), final="model.norm", model=EPS,
        apart=latent_apart,
    ),
    "minimax": Family(
        "MiniMax",
        dict(
            intermediate_size=24, num_hidden_layers=4, head_dim=8, block_size=8, num_local_experts=4,
            num_experts_per_tok=2, layer_types=["linear_attention"] * 3 + ["full_attention"], rms_norm_eps=1e-5,
            full_attn_alpha_factor=3.5, full_attn_beta_factor=0.9, linear_attn_alpha_factor=2.5,
            linear_attn_beta_factor=1.1, mlp_alpha_factor=1.5, mlp_beta_factor=0.8, tie_word_embeddings=False,
            **ATTENTION,
        ),
        """
        layer L = lightning(heads=4, head_dim=8, residual=normed(alpha=2.5, beta=1.1))
        layer A = attention(
          heads=4, kv_heads=2, head_dim=8, rope=rope(theta=1_000_000), residual=normed(alpha=3.5, beta=0.9))
        layer E = moe(
          experts=4, top_k=2, d_ff=24, gated=true, router=softmax(renorm=true),
          residual=normed(alpha=1.5, beta=0.8))
        stack { [L E]*3 A E }
        """,
        pairs(["self_attn"] * 4, "post_attention_layernorm", ".mlp"), final="model.norm", model=EPS,
        apart=minimax_apart,
    ),
    "xlstm": Family(
        "xLSTM",
        dict(
            num_hidden_layers=2, num_heads=4, qk_dim_factor=2.0, v_dim_factor=4.0, chunk_size=8, gate_soft_cap=5.0,
            norm_eps=1e-5,
        ),
        """
        layer X = mlstm(heads=4, key_dim=16, value_dim=32, chunk=4, gate_softcap=5, norm_eps=1e-5)
        layer F = mlp(d_ff=128, gated=true)
        stack { [X F]*2 }
        """,
        each(2, ("norm_mlstm", "mlstm_layer"), ("norm_ffn", "ffn")), embed="backbone.embeddings",
        final="backbone.out_norm", base="backbone.blocks", model=f"{EPS}\n logits_softcap = 30",
    ),
    "rwkv": Family(
        "Rwkv",
        dict(num_hidden_layers=3, attention_hidden_size=48, intermediate_size=80, rescale_every=0),
        """
        layer W = wkv4(d_inner=48, chunk=4)
        layer C = channel_mix(d_ff=80)
        stack { [W C]*3 }
        """,
        each(3, ("ln1", "attention"), ("ln2", "feed_forward")), embed="rwkv.embeddings", final="rwkv.ln_out",
        base="rwkv.blocks", head="head", embed_norm="rwkv.blocks.0.pre_ln", apart=rwkv_apart,
        model="norm = layernorm(eps=1e-5)\n embedding_norm = layernorm(eps=1e-5)",
    ),
    "zaya": Family(
        "Zaya",
        dict(
            num_hidden_layers=3, head_dim=16, moe_intermediate_size=24, num_experts=4, router_hidden_size=16,
            layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=6, **ATTENTION,
        ),
        """
        layer A = cca(heads=4, kv_heads=2, head_dim=16, rope=rope(theta=5_000_000, fraction=0.5), residual=affine)
        layer W = A(window=6, rope=rope(theta=10_000, fraction=0.5))
        layer B = moe(
          experts=4, top_k=1, d_ff=24, gated=true, router=mlp(d_router=16, carry=first), residual=affine)
        layer E = B(router=mlp(d_router=16, carry=next))
        stack { A B W E A E }
        """,
        pairs(["self_attn"] * 3, "post_attention_layernorm", ".mlp"), final="model.norm", tied=True, apart=zaya_apart,
        embed_norm="model.embed_affine", model=f"{EPS}\n embedding_norm = affine\n residual_dtype = fp32",
    ),
    "recurrent_gemma": Family(
        "RecurrentGemma",
        dict(
            intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, lru_width=48,
            head_dim=8, attention_window_size=8, tie_word_embeddings=True,
        ),
        """
        layer R = rg_lru(d_inner=48, blocks=4)
        layer A = attention(
          heads=4, kv_heads=1, head_dim=8, window=8, rope=rope(theta=10_000, fraction=0.5), o_bias=true)
        layer F = mlp(d_ff=48, gated=true, act=gelu_tanh, bias=true)
        stack { [R F]*2 A F }
        """,
        [
            pair for i in range(3)
            for pair in ((f"{i}.temporal_pre_norm", f"{i}.temporal_block"), (f"{i}.channel_pre_norm", f"{i}.mlp_block"))
        ],
        final="model.final_norm", tied=True, apart=griffin_apart,
        model="norm = rmsnorm(eps=1e-6, zero_centered=true)\n embedding_multiplier = 5.65625\n logits_softcap = 30",
    ),
    "zamba": Family(
        "Zamba",
        dict(
            intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, n_mamba_heads=2, mamba_d_state=8,
            num_hidden_layers=4, layers_block_type=zamba_kinds(ZAMBA), tie_word_embeddings=True,
        ),
        """
        layer R = mamba1(d_inner=64, heads=2, d_state=8, dt_rank=2)
        shared T = [
          attention(heads=4, head_dim=16, scale=0.35355339059327373, input=with_embedding, residual=aside)
          mlp(d_ff=48, act=gelu, gated=true, residual=aside)
        ]
        layer P = linear(norm=none, residual=aside)
        stack { [R T P R]*2 }
        """,
        zamba(ZAMBA, "shared_transf"), tied=True, apart=zamba_apart, model=EPS,
    ),
    "zamba2": Family(
        "Zamba2",
        dict(
            mamba_ngroups=1, num_mem_blocks=1, use_shared_attention_adapter=True, use_mem_rope=True,
            layers_block_type=zamba_kinds(ZAMBA2), **ZAMBA2_CONFIG,
        ),
        """
        layer M = mamba2(heads=8, head_dim=8, d_state=8, dt_limit=[0.001, inf], chunk=8)
        layer A = attention(
          heads=4, head_dim=16, scale=0.35355339059327373, rope=rope(theta=10_000), input=with_embedding,
          residual=aside, adapter=lora(rank=4, targets=[qkv_proj], per=segment))
        layer F = mlp(d_ff=48, act=gelu, gated=true, residual=aside, adapter=lora(rank=4, targets=[up_proj]))
        shared T = [A F]
        layer P = linear(norm=none, residual=aside)
        stack { [M T P M]*3 }
        """,
        zamba(ZAMBA2, "shared_transformer"), tied=True, apart=zamba_apart, model=EPS,
    ),
    "zamba2 with two blocks": Family(
        "Zamba2",
        dict(
            mamba_ngroups=2, num_mem_blocks=2, use_shared_attention_adapter=False, use_mem_rope=False,
            layers_block_type=zamba_kinds(ZAMBA2_BLOCKS), **ZAMBA2_CONFIG,
        ),
        """
        layer M = mamba2(heads=8, head_dim=8, d_state=8, groups=2, dt_limit=[0.001, inf], chunk=8)
        layer A = attention(
          heads=4, head_dim=16, scale=0.35355339059327373, rope=none, input=with_embedding, residual=aside)
        layer F = mlp(d_ff=48, act=gelu, gated=true, residual=aside, adapter=lora(rank=4, targets=[up_proj]))
        shared T = [A F]
        shared U = [A F]
        layer P = linear(norm=none, residual=aside)
        stack { M T P M M U P M T P M U P M }
        """,
        zamba(ZAMBA2_BLOCKS, "shared_transformer"), tied=True, apart=zamba_apart, model=EPS,
    ),
}

#: Our name below a mixer -> theirs, joined along axis 0; the first list whose names are all there is taken.
NAMES: dict[str, list[list[str]]] = {
    "qkv_proj.weight": [
        ["q_proj.weight", "k_proj.weight", "v_proj.weight", "v_next_proj.weight"],
        ["q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight"],
        ["q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight"],
        ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
    ],
    "gate_up_proj.weight": [
        ["gate_proj.weight", "up_proj.weight"], ["w1.weight", "w3.weight"],
        ["proj_up_gate.weight", "proj_up.weight"],
    ],
    "down_proj.weight": [["w2.weight"], ["proj_down.weight"]],
    "o_proj.weight": [["out_proj.weight"]],
    "out_proj.weight": [["o_proj.weight"], ["linear_out.weight"], ["weight"]],
    "x_proj.weight": [["x_proj_weight"]],
    "dt_proj.weight": [["dt_proj_weight"]],
    "dt_proj.bias": [["dt_proj_bias"]],
    "adapter.qkv_proj.down.weight": [[f"linear_{name}_adapter.down" for name in "qkv"]],
    "adapter.qkv_proj.up.weight": [[f"linear_{name}_adapter.up" for name in "qkv"]],
    "adapter.gate_up_proj.down.weight": [["gate_up_proj_adapter.down"]],
    "adapter.gate_up_proj.up.weight": [["gate_up_proj_adapter.up"]],
    "k_norm.weight": [["k_layernorm.weight"]],
    "conv.weight": [["conv1d.weight"], ["conv_1d.weight"]],
    "conv.bias": [["conv1d.bias"], ["conv_1d.bias"]],
    "gate_norm.weight": [["norm.weight"], ["o_norm.weight"]],
    "in_proj.bias": [["linear_x.bias", "linear_y.bias"]],
    "out_proj.bias": [["linear_out.bias"]],
    "gate_up_proj.bias": [["gate_proj.bias", "up_proj.bias"]],
    "slope": [["slope_rate"]],
    "input_bias": [["igate_preact.bias"]],
    "forget_bias": [["fgate_preact.bias"]],
    "head_norm.weight": [["multihead_norm.weight"]],
    "a_param": [["rg_lru.recurrent_param"]],
    "input_gate.weight": [["rg_lru.input_gate_weight"]],
    "input_gate.bias": [["rg_lru.input_gate_bias"]],
    "decay_gate.weight": [["rg_lru.recurrent_gate_weight"]],
    "decay_gate.bias": [["rg_lru.recurrent_gate_bias"]],
    "in_proj.weight": [
        ["linear_x.weight", "linear_y.weight"],
        [*(f"{name}.weight" for name in "qkv"), *(f"{gate}gate_preact.weight" for gate in "oif")],
        [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "g_a_proj", "b_proj", "forget_gate.f_a_proj")],
        [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "forget_gate.f_proj")],
        ["q_proj.weight", "kv_a_proj_with_mqa.weight", "g_proj.weight"],
        ["q_proj.weight", "kv_a_proj_with_mqa.weight"], ["q_a_proj.weight", "kv_a_proj_with_mqa.weight"],
        [*(f"{name}_proj.weight" for name in "qkv"), "output_gate.weight"],
        [f"{name}_proj.weight" for name in "qkvgba"], [f"in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")],
    ],
    "dt_bias": [["forget_gate.dt_bias"]],
    "A_log": [["forget_gate.A_log"]],
    "decay_proj.weight": [["forget_gate.f_b_proj.weight"]],
    "gate_proj.weight": [["g_b_proj.weight"]],
    "q_norm.weight": [["q_layernorm.weight"], ["q_a_layernorm.weight"]],
    "q_proj.weight": [["q_b_proj.weight"]],
    "latent_norm.weight": [["kv_a_layernorm.weight"]],
    "kv_proj.weight": [["k_b_proj.weight", "v_b_proj.weight"]],
    "dt_norm.weight": [["dt_layernorm.weight"]],
    "b_norm.weight": [["b_layernorm.weight"]],
    "c_norm.weight": [["c_layernorm.weight"]],
    "router.weight": [["router.weight"], ["gate.weight"], ["block_sparse_moe.router.weight"]],
    "router.bias": [["gate.e_score_correction_bias"], ["expert_bias"]],
    "experts.gate_up_proj": [["experts.gate_up_proj"], ["block_sparse_moe.experts.gate_up_proj"]],
    "experts.down_proj": [["experts.down_proj"], ["block_sparse_moe.experts.down_proj"]],
    "shared.gate_up_proj.weight": [
        ["shared_mlp.input_linear.weight"], ["shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"],
        ["shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"],
    ],
    "shared_gate.weight": [["shared_expert_gate.weight"]],
    "shared.up_proj.weight": [["shared_experts.up_proj.weight"]],
    "shared.down_proj.weight": [
        ["shared_mlp.output_linear.weight"], ["shared_experts.down_proj.weight"], ["shared_expert.down_proj.weight"],
    ],
}


#: The ends of a depth of `mtp`: our name -> theirs.
TAIL = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_norm": "post_norm"}


def theirs(family: Family):
    torch.manual_seed(0)
    given = {**COMMON, **family.config}
    config = getattr(transformers, given.pop("config_class", f"{family.name}Config"))(**given)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family.name}ForCausalLM")(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return randomised(model)


def randomised(model, *, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(CONSTANTS):
                continue
            if tensor.dim() < 2 or "A_log" in name or "norm" in name:
                tensor.add_(0.2 * noise)
            else:
                tensor.copy_(noise * (0.5 if "embed" in name else tensor.shape[-1] ** -0.5))
    return model


def moved(family: Family, graph, weights: dict) -> dict:
    """Their weights under our names. Every one of theirs must be used."""
    used: set[str] = set()

    def take(name: str) -> torch.Tensor:
        used.add(name)
        return weights[name]

    found = {"embed.weight": take(f"{family.embed}.weight")}
    head = take(f"{family.head}.weight")

    def norm(ours: str, name: str) -> None:
        found.update({f"{ours}.{w}": take(f"{name}.{w}") for w in ("weight", "bias") if f"{name}.{w}" in weights})

    norm("final_norm", family.final)
    norm("embed_norm", family.embed_norm)
    if not family.tied:
        found["head.weight"] = head
    model = build(graph, device="meta")
    layers = [n for n in graph.nodes if n.role is Role.LAYER]
    assert len(layers) == len(family.layers)
    for node, (before, *mixers) in zip(layers, family.layers):
        if before is not None:
            norm(f"{node.owner}.norm", f"{family.base}.{before}")
            for term in AFFINE_TERMS:
                norm(f"{node.owner}.{term}", f"{family.base}.{before}.{term}")
            if family.after:
                place, _, name = before.rpartition(".")
                found[f"{node.path}.post_norm.weight"] = take(f"{family.base}.{place}.{family.after}{name}.weight")
        for (own, prefix, _), mixer in zip(node.branches(), mixers, strict=True):
            for path in model.weights:
                # A shared layer's weights, and its use's.
                start = next((p for p in (f"{prefix}.", f"{own}.mixer.") if path.startswith(p)), None)
                if start is None:
                    continue
                name = path.removeprefix(start)
                spellings = [[name], *NAMES.get(name, [])]
                choices = [[f"{family.base}.{mixer}.{n}" for n in names] for names in spellings]
                names = next(names for names in choices if all(n in weights for n in names))
                value = torch.cat([take(n) for n in names])
                found[path] = value.squeeze(1) if name == "conv.weight" else value
    for k in range(model.depths):
        for ours, theirs in TAIL.items():
            found[f"mtp.{k}.{ours}.weight"] = take(f"{family.base}.{family.tail + k}.{theirs}.weight")
    left = set(weights) - used
    assert not left, left
    return found


def test_slopes_begin_as_hugging_faces():
    """By head and by depth: `load_state_dict` above would hide a wrong law."""
    family = FAMILIES["minimax"]
    ours = build(unroll(resolve(read(from_text(family.program(), name="minimax.mdl"))))).tensors()
    for place, slope in enumerate(name for name in ours if name.endswith("slope")):
        theirs_slope = theirs(family).state_dict()[f"model.layers.{place}.self_attn.slope_rate"].flatten()
        torch.testing.assert_close(ours[slope], theirs_slope, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_hugging_face(name):
    family = FAMILIES[name]
    their_model = theirs(family)
    their_weights = family.apart(their_model.state_dict())
    graph = unroll(resolve(read(from_text(family.program(), name=f"{name}.mdl"))))
    ours = build(graph)
    ours.load_state_dict(moved(family, graph, their_weights), strict=True)
    tokens = torch.randint(3, 61, (2, 21), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(21).expand(2, -1)
    with torch.no_grad():
        extra = {} if "backbone" in family.base else dict(position_ids=positions)
        wanted = their_model(input_ids=tokens, use_cache=False, **extra).logits.float()
        logits = ours.eval()(tokens)
    assert wanted.std() > 0.1, "a model whose logits say something"
    torch.testing.assert_close(logits, wanted, atol=LIMIT, rtol=0)


def test_drafts_are_those_of_hugging_face():
    """Two depths of Ling's tail: their `MtpModel` runs one at a time, on the tokens that come later."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    one, depths = FAMILIES["bailing_hybrid"], 2
    kinds = dict(mtp_layer_types=["full_attention"] * depths, mtp_mlp_layer_types=["sparse"] * depths)
    family = replace(
        one, text=one.text + f"mtp(depths={depths}) {{ L E }}", tail=4,
        config={**one.config, **kinds, "num_mtp_layers": depths},
        layers=pairs(["self_attn"] * (4 + depths), "post_attention_layernorm", ".mlp"),
    )
    main = theirs(family)
    tail = MtpModel(main, depths).eval()
    tail.set_experts_implementation("eager")
    randomised(tail.layers, seed=1)
    weights = main.state_dict()
    for name, value in tail.layers.state_dict().items():
        k, _, rest = name.partition(".")
        weights[f"model.layers.{4 + int(k)}.{rest.removeprefix('mtp_block.')}"] = value
    graph = unroll(resolve(read(from_text(family.program(), name="ling.mdl"))))
    ours = build(graph)
    ours.load_state_dict(moved(family, graph, family.apart(weights)), strict=True)
    T = 21
    tokens = torch.randint(3, 61, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(T).expand(2, -1)
    cache = MtpCache(config=main.config.get_mtp_config())
    with torch.no_grad():
        given = main(input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True)
        logits, *drafts = ours.eval().drafts(tokens)
        torch.testing.assert_close(logits, given.logits, atol=LIMIT, rtol=0)
        h = given.hidden_states[-1]
        for k, draft in enumerate(drafts):
            h = tail.forward_layer(k, h[:, : T - 1 - k], positions[:, 1 + k :], cache, input_ids=tokens[:, 1 + k :])
            wanted = main.lm_head(h)
            assert wanted.std() > 0.1
            torch.testing.assert_close(draft[:, : T - 1 - k], wanted, atol=LIMIT, rtol=0)
