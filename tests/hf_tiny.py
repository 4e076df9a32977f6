"""Tiny models of every family that Hugging Face's folders can be imported from: model_type, and what differs from the
class's defaults. Random weights, none of them at its initial value."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

TOKENS = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDTH = dict(hidden_size=32, **TOKENS)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2)
MAMBA2 = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2, mamba_d_conv=4, mamba_expand=2,
    mamba_chunk_size=8,
)
NEMOTRON = dict(
    **WIDTH, **ATTENTION, head_dim=16, intermediate_size=48, ssm_state_size=16, mamba_num_heads=4, mamba_head_dim=12,
    n_groups=2, chunk_size=8, tie_word_embeddings=False,
)
EXPERTS = dict(
    layers_block_type=["linear_attention", "moe", "full_attention", "moe"], n_routed_experts=8, num_experts_per_tok=3,
    moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, routed_scaling_factor=2.5,
)
GRANITE = dict(
    **WIDTH, **ATTENTION, **MAMBA2, num_hidden_layers=3, tie_word_embeddings=True, embedding_multiplier=12.0,
    attention_multiplier=0.125, residual_multiplier=0.22, logits_scaling=6.0,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
DELTA = dict(
    **WIDTH, **ATTENTION, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=12, linear_conv_kernel_dim=4, tie_word_embeddings=False,
)
QWEN_EXPERTS = dict(
    moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=6, num_experts_per_tok=3,
)
MROPE = dict(
    rope_parameters=dict(
        rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_interleaved=True,
        mrope_section=[2, 1, 1],
    ),
)

KIMI = dict(
    **WIDTH, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, moe_intermediate_size=24,
    num_hidden_layers=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)

LING_YARN = dict(
    **KIMI, head_dim=8, layer_group_size=1, first_k_dense_replace=3, num_local_experts=8, num_experts_per_tok=2,
    n_group=1, topk_group=1, num_mtp_layers=0, max_position_embeddings=64,
)
ZAMBA2 = dict(
    **WIDTH, intermediate_size=48, num_hidden_layers=6, mamba_d_state=8, n_mamba_heads=8, chunk_size=8,
    num_attention_heads=4, num_key_value_heads=4, adapter_rank=4, tie_word_embeddings=True,
)
MINIMAX = dict(
    **WIDTH, **ATTENTION, intermediate_size=24, num_hidden_layers=4, head_dim=8, block_size=8, num_local_experts=4,
    num_experts_per_tok=2, tie_word_embeddings=False, linear_attn_alpha_factor=2.5, linear_attn_beta_factor=1.1,
    full_attn_alpha_factor=3.5, full_attn_beta_factor=0.9, mlp_alpha_factor=1.5, mlp_beta_factor=0.8,
)

#: name: (model_type, settings).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", dict(**WIDTH, state_size=8, num_hidden_layers=2, tie_word_embeddings=True)),
    "mamba biases": ("mamba", dict(
        **WIDTH, state_size=8, num_hidden_layers=2, use_bias=True, use_conv_bias=False, time_step_rank=3,
        residual_in_fp32=False, tie_word_embeddings=False, intermediate_size=48,
    )),
    "falcon_mamba": ("falcon_mamba", dict(
        **WIDTH, state_size=8, num_hidden_layers=2, mixer_rms_eps=1e-5, tie_word_embeddings=False,
    )),
    "mamba2": ("mamba2", dict(
        **WIDTH, num_heads=8, head_dim=8, state_size=16, n_groups=4, num_hidden_layers=2, chunk_size=8, use_bias=True,
        tie_word_embeddings=False,
    )),
    "mamba2 limits": ("mamba2", dict(
        **WIDTH, num_heads=8, head_dim=8, state_size=16, n_groups=2, num_hidden_layers=2, chunk_size=8,
        time_step_limit=[0.5, 1.0], tie_word_embeddings=True,
    )),
    "jamba": ("jamba", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=8,
        tie_word_embeddings=False,
    )),
    "jamba dense": ("jamba", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=3, attn_layer_period=2, attn_layer_offset=1,
        num_experts=1, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=5, tie_word_embeddings=True,
    )),
    "bamba": ("bamba", dict(
        **WIDTH, **ATTENTION, **MAMBA2, intermediate_size=48, num_hidden_layers=3, attn_layer_indices=[1],
        attention_bias=True, tie_word_embeddings=False,
    )),
    "nemotron_h": ("nemotron_h", dict(
        **NEMOTRON, layers_block_type=["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
        residual_in_fp32=True,
    )),
    "nemotron_h experts": ("nemotron_h", dict(**NEMOTRON, **EXPERTS, n_group=2, topk_group=1)),
    "nemotron_h latent": ("nemotron_h", dict(**NEMOTRON, **EXPERTS, moe_latent_size=16, norm_topk_prob=False)),
    "falcon_h1": ("falcon_h1", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=2, head_dim=16, mamba_d_ssm=48, mamba_n_heads=6,
        mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8, mamba_rms_norm=False,
        mamba_norm_before_gate=False, key_multiplier=0.35, attention_in_multiplier=1.1, attention_out_multiplier=0.9,
        embedding_multiplier=5.6, lm_head_multiplier=0.25, mlp_multipliers=[0.88, 0.3], ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.24, ssm_multipliers=[0.35, 0.25, 0.17, 0.5, 0.35], tie_word_embeddings=False,
    )),
    "falcon_h1 norms": ("falcon_h1", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=2, mamba_d_ssm=64, mamba_n_heads=8,
        mamba_d_head=8, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=8, mamba_rms_norm=True,
        mamba_norm_before_gate=True, projectors_bias=True, mamba_proj_bias=True, tie_word_embeddings=True,
    )),
    "granitemoehybrid": ("granitemoehybrid", dict(
        **GRANITE, intermediate_size=24, shared_intermediate_size=40, num_local_experts=6, num_experts_per_tok=3,
        position_embedding_type=None,
    )),
    "granitemoehybrid dense": ("granitemoehybrid", dict(
        **GRANITE, intermediate_size=48, shared_intermediate_size=40, num_local_experts=0, num_experts_per_tok=0,
        position_embedding_type="rope",
    )),
    "lfm2": ("lfm2", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=4, block_multiple_of=8, conv_bias=True,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )),
    "lfm2_moe": ("lfm2_moe", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=4, num_dense_layers=2,
        num_experts=6, num_experts_per_tok=2, layer_types=["conv", "conv", "full_attention", "conv"],
        routed_scaling_factor=1.5,
    )),
    "lfm2_moe no bias": ("lfm2_moe", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_dense_layers=0,
        num_experts=6, num_experts_per_tok=2, layer_types=["conv", "full_attention"], use_expert_bias=False,
        norm_topk_prob=False,
    )),
    "olmo_hybrid": ("olmo_hybrid", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=4, linear_num_key_heads=4,
        linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=12, linear_allow_neg_eigval=True,
        tie_word_embeddings=False,
    )),
    "olmo_hybrid no rope": ("olmo_hybrid", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=2, linear_num_key_heads=4,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_allow_neg_eigval=False,
        layer_types=["linear_attention", "full_attention"], tie_word_embeddings=False,
        rope_parameters=dict(rope_theta=None, rope_type="default"),
    )),
    "qwen3_next": ("qwen3_next", dict(
        **DELTA, **QWEN_EXPERTS, head_dim=16, intermediate_size=48, mlp_only_layers=[1], attention_bias=True,
    )),
    "qwen3_next yarn": ("qwen3_next", dict(
        **DELTA, **QWEN_EXPERTS, head_dim=16, norm_topk_prob=False,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e6, partial_rotary_factor=0.5, factor=4.0,
            original_max_position_embeddings=32,
        ),
    )),
    "qwen3_5": ("qwen3_5_text", dict(**DELTA, head_dim=32, intermediate_size=48, **MROPE)),
    "qwen3_5_moe": ("qwen3_5_moe_text", dict(**DELTA, **QWEN_EXPERTS, head_dim=32, **MROPE)),
    "kimi_linear": ("kimi_linear", dict(
        **KIMI, linear_head_dim=12, linear_num_heads=4, num_local_experts=8, num_experts_per_tok=2,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    )),
    "kimi_linear queries": ("kimi_linear", dict(
        **KIMI, linear_head_dim=8, linear_num_heads=4, num_local_experts=8, num_experts_per_tok=3, q_lora_rank=12,
        n_group=2, topk_group=1, norm_topk_prob=False, n_shared_experts=2,
        layer_types=["full_attention", "linear_attention"] * 2, mlp_layer_types=["sparse"] * 4,
    )),
    "bailing_hybrid": ("bailing_hybrid", dict(
        **KIMI, head_dim=8, layer_group_size=2, first_k_dense_replace=1, num_local_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, num_mtp_layers=0,
    )),
    "bailing_hybrid softplus": ("bailing_hybrid", dict(
        **KIMI, head_dim=8, layer_group_size=4, first_k_dense_replace=2, num_local_experts=8, num_experts_per_tok=2,
        n_group=1, topk_group=1, num_mtp_layers=0, kda_safe_gate=False,
    )),
    "bailing_hybrid yarn": ("bailing_hybrid", dict(
        **LING_YARN, rope_parameters=dict(
            rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, beta_fast=8.0,
            beta_slow=1.0, mscale=1.0, mscale_all_dim=0.5,
        ),
    )),
    "bailing_hybrid yarn alone": ("bailing_hybrid", dict(
        **LING_YARN, rope_parameters=dict(
            rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, mscale_all_dim=2.0,
        ),
    )),
    "bailing_hybrid linear": ("bailing_hybrid", dict(
        **LING_YARN, rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=4.0),
    )),
    "zamba": ("zamba", dict(
        **WIDTH, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, n_mamba_heads=2, mamba_d_state=8,
        num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        mamba_proj_bias=True, tie_word_embeddings=True,
    )),
    "zamba2": ("zamba2", dict(
        **ZAMBA2, num_mem_blocks=1, use_shared_attention_adapter=True, use_mem_rope=True,
        layers_block_type=["linear_attention", "hybrid"] * 3,
    )),
    "zamba2 two blocks": ("zamba2", dict(
        **ZAMBA2, num_mem_blocks=2, mamba_ngroups=2,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"],
    )),
    "minimax": ("minimax", dict(
        **MINIMAX, layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    )),
    "lfm3": ("lfm3", dict(
        **WIDTH, **ATTENTION, intermediate_size=48, num_hidden_layers=5, head_dim=16, sliding_window=6,
    )),
    "xlstm": ("xlstm", dict(**TOKENS, hidden_size=128, num_hidden_layers=2, num_heads=4, chunk_size=8)),
    "xlstm shares": ("xlstm", dict(
        **TOKENS, hidden_size=48, num_hidden_layers=2, num_heads=2, chunk_size=4, qk_dim_factor=8 / 3, v_dim_factor=4.0,
        ffn_proj_factor=1.3, ffn_round_up_to_multiple_of=7, gate_soft_cap=2.5, output_logit_soft_cap=3.0,
        norm_eps=1e-5, eps=1e-3,
    )),
    "rwkv": ("rwkv", dict(**WIDTH, num_hidden_layers=3, rescale_every=0)),
    "rwkv widths": ("rwkv", dict(
        **WIDTH, num_hidden_layers=2, attention_hidden_size=48, intermediate_size=56, layer_norm_epsilon=1e-3,
        context_length=64, tie_word_embeddings=True, rescale_every=0,
    )),
    "zaya": ("zaya", dict(
        **WIDTH, **ATTENTION, num_hidden_layers=3, head_dim=16, moe_intermediate_size=24, num_experts=4,
        router_hidden_size=16,
    )),
    "zaya windows": ("zaya", dict(
        **WIDTH, **ATTENTION, num_hidden_layers=4, head_dim=8, moe_intermediate_size=24, num_experts=6,
        router_hidden_size=12, cca_time0=3, cca_time1=4, attention_bias=True, sliding_window=6, hidden_act="gelu",
        layer_types=["hybrid", "hybrid_sliding"] * 2, tie_word_embeddings=False,
    )),
    "recurrent_gemma": ("recurrent_gemma", dict(
        **TOKENS, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, lru_width=48, attention_window_size=8,
    )),
}


def config(name: str) -> Any:
    import transformers

    model_type, given = CONFIGS[name]
    return transformers.AutoConfig.for_model(model_type, **given)


@cache
def model(name: str) -> Any:
    """Theirs, with weights that say something."""
    import torch
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(name), dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, tensor in made.state_dict(keep_vars=True).items():
            # Slopes say nothing that a layer's depth does not say, and the decays follow from them.
            if tensor.is_floating_point() and not path.endswith(("slope_rate", "_decay")):
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise * (0.2 if tensor.dim() < 2 or "norm" in path else 0.5 * tensor.shape[-1] ** -0.5))
            # Whatever a folder says, transformers loads this.
            if path.endswith("balancing_biases"):
                tensor[-1] = -1
    return made.eval()


def saved(name: str, folder: Path, **how: Any) -> Path:
    model(name).save_pretrained(folder, **how)
    return folder
