"""The published models as their own configurations say, in the words of Hugging Face configuration classes.

`CONFIGS` holds what their config.json files give beyond each class's defaults (sources: the models' own
repositories, Megatron-Bridge for Nemotron-H and Falcon-H1, microsoft/Samba for Samba). Falcon-H1 1.5B and
3B: without their multipliers, which were not found. Nothing here comes from a .mdl file.
"""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

KI = 1024
H52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H98 = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
)
H118 = (
    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-"
    "M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
)
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
NANO_3 = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER_3 = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"


def _mamba(d: int, n: int) -> tuple[str, dict]:
    return "Mamba", dict(hidden_size=d, num_hidden_layers=n, vocab_size=50280, state_size=16)


def _mamba2(d: int, n: int) -> tuple[str, dict]:
    return "Mamba2", dict(
        hidden_size=d, num_hidden_layers=n, vocab_size=50288, num_heads=2 * d // 64, head_dim=64, n_groups=1,
        state_size=128, tie_word_embeddings=True,
    )


def _jamba(**more: Any) -> tuple[str, dict]:
    return "Jamba", dict(max_position_embeddings=256 * KI, **more)


def _nemotron(pattern: str, d: int, ff: int, h: int, ssm: tuple, context: int, kv: int = 8, **more: Any):
    heads, head_dim, state = ssm
    return "NemotronH", dict(
        hybrid_override_pattern=pattern, hidden_size=d, intermediate_size=ff, num_attention_heads=h,
        num_key_value_heads=kv, mamba_num_heads=heads, mamba_head_dim=head_dim, ssm_state_size=state,
        vocab_size=131072, max_position_embeddings=context, **more,
    )


def _falcon(n: int, d: int, ff: int, attn: tuple, ssm: tuple, vocab: int, **more: Any) -> tuple[str, dict]:
    (h, kv, head_dim), (mh, mp, state, groups) = attn, ssm
    return "FalconH1", dict(
        num_hidden_layers=n, hidden_size=d, intermediate_size=ff,
        num_attention_heads=h, num_key_value_heads=kv, head_dim=head_dim,
        mamba_n_heads=mh, mamba_d_head=mp, mamba_d_ssm=mh * mp, mamba_d_state=state,
        mamba_n_groups=groups, vocab_size=vocab, mamba_norm_before_gate=False, rope_theta=1e11, **more,
    )


def _mup(head: float, key: float, attn_out: float, ssm: tuple, mlp: tuple, b: float) -> dict:
    """Multipliers of Falcon-H1. ssm: in, out; mlp: gate, down; b: of B, the one of five that varies."""
    return dict(
        embedding_multiplier=5.656854249492381, lm_head_multiplier=head, key_multiplier=key,
        attention_out_multiplier=attn_out, ssm_in_multiplier=ssm[0], ssm_out_multiplier=ssm[1],
        mlp_multipliers=list(mlp),
        ssm_multipliers=[0.3535533905932738, 0.25, b, 0.5, 0.3535533905932738],
    )


GRANITE_LAYERS = ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)]


def _granite(d: int, h: int, kv: int, ff: int, shared: int, experts: tuple = (0, 0)) -> tuple[str, dict]:
    return "GraniteMoeHybrid", dict(
        hidden_size=d, num_hidden_layers=40, num_attention_heads=h, num_key_value_heads=kv,
        intermediate_size=ff, shared_intermediate_size=shared,
        num_local_experts=experts[0], num_experts_per_tok=experts[1],
        vocab_size=100352, layer_types=GRANITE_LAYERS, mamba_n_heads=2 * d // 64, mamba_d_state=128,
        rms_norm_eps=1e-5, max_position_embeddings=128 * KI, tie_word_embeddings=True,
        embedding_multiplier=12, residual_multiplier=0.22, attention_multiplier=h / d, logits_scaling=d / 256,
    )


def _lfm2(d: int, h: int, ff: int, n: int, attention: list[int], *, adjusted: bool = True) -> tuple[str, dict]:
    return "Lfm2", dict(
        vocab_size=65536, hidden_size=d, num_attention_heads=h, num_key_value_heads=8, num_hidden_layers=n,
        block_ff_dim=ff, block_auto_adjust_ff_dim=adjusted, full_attn_idxs=attention,
    )


LFM2_16 = [2, 5, 8, 10, 12, 14]
LFM2_30 = [2, 5, 9, 13, 17, 21, 24, 27]
#: Counted from 1.
KIMI_FULL = [4, 8, 12, 16, 20, 24, 27]


def _zamba2(d: int, n: int, hybrids: list[int], **more: Any) -> tuple[str, dict]:
    kinds = ["hybrid" if i in hybrids else "linear_attention" for i in range(n)]
    return "Zamba2", dict(
        hidden_size=d, num_hidden_layers=n, layers_block_type=kinds, n_mamba_heads=2 * d // 64, intermediate_size=4 * d,
        num_attention_heads=32, adapter_rank=128, **more,
    )


#: Of text alone: the three kinds of positions of its rope are one.
QWEN_3_5 = dict(
    max_position_embeddings=256 * KI,
    rope_parameters=dict(rope_type="default", rope_theta=10_000_000, partial_rotary_factor=0.25),
)


def _samba(d: int, n: int, h: int, ff: int) -> tuple[str, dict]:
    return "Samba", dict(
        n_embd=d, n_layer=n, n_head=h, intermediate_size=ff, vocab_size=32000, block_size=4096, norm_eps=1e-5,
        local_window=2048, mb_per_layer=2, rotary_percentage=1.0,
    )


#: As microsoft/Phi-4-mini-flash-reasoning says; sizes of Mamba-1 are its class's defaults.
PHI_4_MINI_FLASH = dict(
    vocab_size=200064, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=40,
    num_key_value_heads=20, sliding_window=512, layer_norm_eps=1e-5, mb_per_layer=2, mamba_d_state=16, mamba_d_conv=4,
    mamba_expand=2, mamba_dt_rank=160, tie_word_embeddings=True,
)

#: name of the .mdl file: (class, what differs from the class's defaults).
CONFIGS: dict[str, tuple[str, dict]] = {
    "mamba_130m": _mamba(768, 24),
    "mamba_370m": _mamba(1024, 48),
    "mamba_790m": _mamba(1536, 48),
    "mamba_1_4b": _mamba(2048, 48),
    "mamba_2_8b": _mamba(2560, 64),
    "mamba2_130m": _mamba2(768, 24),
    "mamba2_370m": _mamba2(1024, 48),
    "mamba2_780m": _mamba2(1536, 48),
    "mamba2_1_3b": _mamba2(2048, 48),
    "mamba2_2_7b": _mamba2(2560, 64),
    "codestral_mamba_7b": ("Mamba2", {}),
    "falcon_mamba_7b": ("FalconMamba", dict(
        hidden_size=4096, num_hidden_layers=64, vocab_size=65024, time_step_rank=256,
        tie_word_embeddings=False,
    )),
    "jamba_v0_1": _jamba(),
    "jamba_1_5_large": _jamba(
        hidden_size=8192, num_hidden_layers=72, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=24576,
    ),
    "jamba_reasoning_3b": _jamba(
        hidden_size=2560, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=20,
        num_key_value_heads=1, num_experts=1, num_experts_per_tok=1, attn_layer_period=14,
        attn_layer_offset=7, tie_word_embeddings=True,
    ),
    "bamba_9b": ("Bamba", dict(
        vocab_size=128256, attn_layer_indices=[9, 18, 27], mamba_d_state=128, max_position_embeddings=4 * KI,
    )),
    "nemotron_h_4b": _nemotron(H52, 3072, 12288, 32, (112, 64, 128), 8 * KI),
    "nemotron_h_8b": _nemotron(H52, 4096, 21504, 32, (128, 64, 128), 8 * KI),
    "nemotron_h_47b": _nemotron(H98, 8192, 30720, 64, (256, 64, 256), 8 * KI),
    "nemotron_h_56b": _nemotron(H118, 8192, 32768, 64, (256, 64, 256), 8 * KI),
    "nemotron_nano_9b_v2": _nemotron(NANO_9B, 4480, 15680, 40, (128, 80, 128), 128 * KI),
    "nemotron_nano_12b_v2": _nemotron(NANO_12B, 5120, 20480, 40, (128, 80, 128), 128 * KI),
    "nemotron_3_nano_30b_a3b": _nemotron(
        NANO_3, 2688, 1856, 32, (64, 64, 128), 256 * KI, kv=2, n_routed_experts=128, num_experts_per_tok=6,
        moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, routed_scaling_factor=2.5,
    ),
    "nemotron_3_super_120b_a12b": _nemotron(
        SUPER_3, 4096, 2688, 32, (128, 64, 128), 256 * KI, kv=2, n_routed_experts=512, num_experts_per_tok=22,
        moe_intermediate_size=2688, moe_shared_expert_intermediate_size=5376, moe_latent_size=1024,
        routed_scaling_factor=5.0,
    ),
    "falcon_h1_0_5b": _falcon(
        36, 1024, 2048, (8, 2, 64), (24, 64, 128, 1), 32784, mamba_rms_norm=False, mamba_chunk_size=128,
        max_position_embeddings=16 * KI,
        **_mup(
            0.0390625, 0.39062499999999994, 0.9375, (1.25, 0.23570226039551587),
            (0.8838834764831844, 0.5859375), 0.3535533905932738,
        ),
    ),
    "falcon_h1_1_5b": _falcon(
        24, 2048, 4608, (8, 2, 128), (48, 64, 256, 1), 65537, mamba_rms_norm=True, mamba_chunk_size=256,
        max_position_embeddings=128 * KI,
    ),
    "falcon_h1_1_5b_deep": _falcon(
        66, 1280, 3072, (6, 2, 128), (24, 64, 256, 1), 65537, mamba_rms_norm=True, mamba_chunk_size=128,
        max_position_embeddings=128 * KI,
        **_mup(
            0.03125, 0.17677669529663687, 0.5, (1.0, 0.23570226039551587), (0.7071067811865476, 0.3125),
            0.1767766952966369,
        ),
    ),
    "falcon_h1_3b": _falcon(
        32, 2560, 6144, (10, 2, 128), (32, 128, 256, 1), 65537, mamba_rms_norm=True, mamba_chunk_size=256,
        max_position_embeddings=128 * KI,
    ),
    "falcon_h1_7b": _falcon(
        44, 3072, 12288, (12, 2, 128), (24, 128, 256, 1), 130049, mamba_rms_norm=True, mamba_chunk_size=256,
        max_position_embeddings=256 * KI,
        **_mup(
            0.013020833333333334, 0.030690398488999456, 0.10416666666666667,
            (0.4166666666666667, 0.11785113019775793), (0.2946278254943948, 0.032552083333333336),
            0.1767766952966369,
        ),
    ),
    "falcon_h1_34b": _falcon(
        72, 5120, 21504, (20, 4, 128), (32, 128, 256, 2), 261120, mamba_rms_norm=True, mamba_chunk_size=128,
        max_position_embeddings=256 * KI,
        **_mup(
            0.0078125, 0.011048543456039804, 0.0375, (0.25, 0.08838834764831845),
            (0.1767766952966369, 0.011160714285714284), 0.1767766952966369,
        ),
    ),
    "granite_4_0_h_tiny": _granite(1536, 12, 4, 512, 1024, (64, 6)),
    "granite_4_0_h_small": _granite(4096, 32, 8, 768, 1536, (72, 10)),
    "granite_4_0_h_micro": _granite(2048, 32, 8, 8192, 8192),
    "granite_4_0_h_1b": _granite(1536, 12, 4, 4096, 4096),
    "lfm2_350m": _lfm2(1024, 16, 6656, 16, LFM2_16),
    "lfm2_700m": _lfm2(1536, 24, 10240, 16, LFM2_16),
    "lfm2_1_2b": _lfm2(2048, 32, 12288, 16, LFM2_16),
    "lfm2_2_6b": _lfm2(2048, 32, 10752, 30, LFM2_30, adjusted=False),
    "lfm2_8b_a1b": ("Lfm2Moe", dict(
        num_hidden_layers=24,
        layer_types=["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    )),
    "olmo_hybrid_7b": ("OlmoHybrid", dict(rope_parameters=dict(rope_theta=None, rope_type="default"))),
    "qwen3_next_80b_a3b": ("Qwen3Next", dict(
        max_position_embeddings=256 * KI,
        rope_parameters=dict(rope_type="default", rope_theta=10_000_000, partial_rotary_factor=0.25),
    )),
    "qwen3_5_9b": ("Qwen3_5", QWEN_3_5),
    "qwen3_5_35b_a3b": ("Qwen3_5Moe", QWEN_3_5),
    "lfm3_1_7b": ("Lfm3", {}),
    "minimax_text_01": ("MiniMax", dict(
        hidden_size=6144, intermediate_size=9216, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, num_local_experts=32, num_experts_per_tok=2, vocab_size=200064,
        layer_types=["full_attention" if i % 8 == 7 else "linear_attention" for i in range(80)],
        max_position_embeddings=10_240_000,
        rope_parameters=dict(rope_type="default", rope_theta=10_000_000, partial_rotary_factor=0.5),
        **{f"{of}_alpha_factor": 3.5565588200778455 for of in ("linear_attn", "full_attn", "mlp")},
    )),
    "xlstm_7b": ("xLSTM", {}),
    "rwkv_4_7b": ("Rwkv", {}),
    "zaya1_8b": ("Zaya", {}),
    "recurrent_gemma_2b": ("RecurrentGemma", dict(intermediate_size=15360, num_key_value_heads=1)),
    "recurrent_gemma_9b": ("RecurrentGemma", dict(
        hidden_size=4096, intermediate_size=24576, num_hidden_layers=38, num_attention_heads=16,
        num_key_value_heads=1, lru_width=4096,
    )),
    "kimi_linear_48b_a3b": ("KimiLinear", dict(
        linear_attn_config=dict(
            full_attn_layers=KIMI_FULL, kda_layers=[i for i in range(1, 28) if i not in KIMI_FULL], num_heads=32,
            head_dim=128, short_conv_kernel_size=4,
        ),
    )),
    "ling_3_0_flash": ("BailingHybrid", dict(num_mtp_layers=0)),
    "zamba_7b_v1": ("Zamba", {}),
    "zamba2_1_2b": _zamba2(
        2048, 38, [5, 11, 17, 23, 29, 35], mamba_d_state=128, num_mem_blocks=1, use_shared_attention_adapter=True,
        use_mem_rope=True,
    ),
    "zamba2_2_7b": _zamba2(2560, 54, [6, 12, 18, 24, 30, 36, 42, 47, 51], num_mem_blocks=2),
    "zamba2_7b": _zamba2(3584, 81, [6, *range(11, 78, 6)], mamba_ngroups=2, num_mem_blocks=2, use_mem_rope=True),
    "phi_4_mini_flash": ("Phi4Flash", PHI_4_MINI_FLASH),
    "samba_421m": _samba(1536, 12, 12, 4096),
    "samba_1_3b": _samba(2304, 18, 18, 6144),
}


#: Of families whose text model has a configuration of its own.
CONFIG_CLASSES = {"Qwen3_5": "Qwen3_5TextConfig", "Qwen3_5Moe": "Qwen3_5MoeTextConfig"}


@cache
def config(name: str) -> Any:
    """The configuration object (of what has no class: its plain values)."""
    family, given = CONFIGS[name]
    if family in ("Samba", "Phi4Flash"):
        return SimpleNamespace(**given)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return getattr(transformers, CONFIG_CLASSES.get(family, f"{family}Config"))(**given)


@cache
def hugging_face_params(name: str) -> int:
    """Parameters of the Hugging Face model, built without memory; tied weights once."""
    import torch
    import transformers

    family, _ = CONFIGS[name]
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config(name))
    model.tie_weights()
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
