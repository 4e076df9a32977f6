"""Megatron's arguments that say what model it is: their types, defaults and spellings.

An argument has a name as in TransformerConfig (`add_bias_linear`) and a flag (`--disable-bias-linear`); both are read.
Names and defaults are those of Megatron-LM's arguments.py and of its transformer, MLA and hybrid configurations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

#: What flags without a value must be.
BOOL = "true or false"
#: Characters of a row, written out.
MAX_ROW = 100_000


@dataclass(frozen=True)
class Flag:
    """read: of text or of a value; raises ValueError. says: what it must be. flag: its spelling, where it is not the
    name's; off: the spelling of false, for what is true unless said. words: of its value, at the most."""

    read: Callable[[Any], Any]
    says: str
    default: Any = None
    flag: str = ""
    off: str = ""
    words: int = 1


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value.replace("_", "") if isinstance(value, str) else value)


def _float(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(value)
    number = float(value)
    return int(number) if number.is_integer() else number


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _words(value: Any) -> tuple[str, ...]:
    """`a b`, `[a b]`, [a, b]."""
    return tuple(value.strip("[]").replace(",", " ").split() if isinstance(value, str) else map(_word, value))


def _numbers(value: Any) -> tuple[float, ...]:
    """`0.01`, `0.01 0.001`, [0.01, 0.001]."""
    words = value.strip("[]").replace(",", " ").split() if isinstance(value, str) else value
    return tuple(map(_float, words if isinstance(words, list | tuple) else [words]))


def _pair(value: Any) -> tuple[int, int]:
    """`(128,0)`, `128,0`, [128, 0]."""
    parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
    left, right = map(_int, parts)
    return left, right


def _often(value: Any) -> int | tuple[int, ...]:
    """`4`, or a row for all layers as `([0]*3+[1])*8`."""
    if not isinstance(value, str):
        return tuple(map(_int, value)) if isinstance(value, list | tuple) else _int(value)
    text = value.replace(" ", "")
    while len(text) < MAX_ROW and (shorter := _unfold(text)) != text:
        text = shorter
    return tuple(map(int, text[1:-1].split(","))) if re.fullmatch(r"\[[01](,[01])*\]", text) else _int(text)


def _unfold(text: str) -> str:
    """One round of `[0]*3` -> [0,0,0], `[0]+[1]` -> [0,1], `([0])` -> [0]."""
    def repeated(m: re.Match) -> str:
        if len(m[1]) * int(m[2]) > MAX_ROW:
            raise ValueError("a row that long")
        return f"[{','.join([m[1]] * int(m[2]))}]"

    text = re.sub(r"\[([01,]+)\]\*([0-9]{1,4})(?![0-9])", repeated, text)
    return re.sub(r"\((\[[01,]+\])\)", r"\1", re.sub(r"\](?!\*)\+(\[[01,]+\])(?!\*)", lambda m: "," + m[1][1:], text))


def _flag(default: bool = False, *, flag: str = "", off: str = "") -> Flag:
    return Flag(_bool, BOOL, default, flag, off)


def _whole(default: int | None = None, *, flag: str = "") -> Flag:
    return Flag(_int, "a whole number", default, flag)


def _real(default: float | None = None, *, flag: str = "") -> Flag:
    return Flag(_float, "a number", default, flag)


def _text(default: str | None = None) -> Flag:
    return Flag(_word, "a word", default)


def _row() -> Flag:
    return Flag(_often, "a number, or a row of 0 and 1 as in `[0,1]*8`")


#: In the order in which they are written.
FLAGS: dict[str, Flag] = {
    "spec": Flag(_words, "two words: a module and its spec", words=2),
    "hybrid_layer_pattern": _text(),
    "num_layers": _whole(), "mtp_num_layers": _whole(), "mtp_use_repeated_layer": _flag(),
    "mtp_hybrid_override_pattern": _text(),
    "hybrid_attention_ratio": _real(), "hybrid_mlp_ratio": _real(),
    "hidden_size": _whole(),
    "vocab_size": _whole(), "padded_vocab_size": _whole(), "make_vocab_size_divisible_by": _whole(128),
    "seq_length": _whole(), "max_position_embeddings": _whole(),
    "untie_embeddings_and_output_weights": _flag(),
    "normalization": _text("LayerNorm"), "layernorm_epsilon": _real(1e-5, flag="--norm-epsilon"),
    "layernorm_zero_centered_gamma": _flag(flag="--apply-layernorm-1p"),
    "add_bias_linear": _flag(True, off="--disable-bias-linear"), "add_qkv_bias": _flag(),
    "hidden_dropout": _real(0.1), "attention_dropout": _real(0.1),
    "fp32_residual_connection": _flag(), "init_method_std": _real(0.02),
    "mamba_num_heads": _whole(), "mamba_head_dim": _whole(64), "mamba_state_dim": _whole(128),
    "mamba_num_groups": _whole(8),
    "linear_num_value_heads": _whole(32), "linear_num_key_heads": _whole(16), "linear_value_head_dim": _whole(128),
    "linear_key_head_dim": _whole(128), "linear_conv_kernel_dim": _whole(4),
    "num_attention_heads": _whole(), "group_query_attention": _flag(), "num_query_groups": _whole(),
    "kv_channels": _whole(), "qk_layernorm": _flag(), "attention_output_gate": _flag(),
    "window_size": Flag(_pair, "two whole numbers, as in `128,0`"), "window_attn_skip_freq": _row(),
    "position_embedding_type": _text("learned_absolute"), "use_rotary_position_embeddings": _flag(),
    "rotary_base": _real(10000), "rotary_percent": _real(1), "rotary_seq_len_interpolation_factor": _real(),
    "no_rope_freq": _row(), "rope_type": _text(), "rotary_scaling_factor": _real(1), "mscale": _real(1),
    "mscale_all_dim": _real(0), "yarn_beta_fast": _real(), "yarn_beta_slow": _real(),
    "yarn_original_max_position_embeddings": _whole(),
    "yarn_correction_range_round_to_int": _flag(True, off="--no-yarn-correction-range-round-to-int"),
    "multi_latent_attention": _flag(), "q_lora_rank": _whole(), "kv_lora_rank": _whole(32), "qk_head_dim": _whole(128),
    "qk_pos_emb_head_dim": _whole(64), "v_head_dim": _whole(128),
    "ffn_hidden_size": _whole(), "swiglu": _flag(), "squared_relu": _flag(), "quick_geglu": _flag(),
    "bias_gelu_fusion": _flag(True, off="--no-bias-gelu-fusion"),
    "num_experts": _whole(), "moe_ffn_hidden_size": _whole(), "moe_router_topk": _whole(2),
    "moe_router_score_function": _text("softmax"), "moe_router_pre_softmax": _flag(),
    "moe_router_topk_scaling_factor": _real(), "moe_router_enable_expert_bias": _flag(),
    "moe_router_num_groups": _whole(), "moe_router_group_topk": _whole(),
    "moe_router_load_balancing_type": Flag(_words, "sorts of balancing", ("aux_loss",), words=4),
    "moe_aux_loss_coeff": Flag(_numbers, "a number for each sort of balancing", (0,), words=4),
    "moe_z_loss_coeff": _real(), "moe_router_bias_update_rate": _real(1e-3),
    "moe_shared_expert_intermediate_size": _whole(), "moe_shared_expert_gate": _flag(), "moe_latent_size": _whole(),
    "tensor_model_parallel_size": _whole(1), "pipeline_model_parallel_size": _whole(1),
    "decoder_first_pipeline_num_layers": _whole(), "decoder_last_pipeline_num_layers": _whole(),
    # Looked at to refuse what they ask for.
    "rotary_interleaved": _flag(), "qk_l2_norm": _flag(), "softmax_type": _text("vanilla"), "use_mup": _flag(),
    "apply_residual_connection_post_layernorm": _flag(), "glu_linear_offset": _real(0),
    "activation_func_clamp_value": _real(), "experimental_attention_variant": _text(), "mtp_hsm": _flag(),
    "enable_hyper_connections": _flag(), "use_rope_scaling": _flag(), "mla_down_proj_fusion": _flag(),
    "heterogeneous_layers_config_path": _text(), "expert_model_parallel_size": _whole(1),
    "expert_tensor_parallel_size": _whole(), "transformer_impl": _text("transformer_engine"),
}
#: Names of before, and of other readers of the same settings.
ALIASES = {
    "hybrid_override_pattern": "hybrid_layer_pattern", "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor", "max_sequence_length": "seq_length",
}
#: Arguments that change nothing that a trained model computes: data, training, devices, precision, output.
NEUTRAL = tuple(
    """
    *train* *eval* *test* valid* lr lr_* min_lr *adam* *sgd* *muon* optimizer* *decay* clip_grad *grad* *loss*
    *batch* *save* *load* *ckpt* *checkpoint* *log* *tensorboard* *wandb* *data* split *tokenizer* *tiktoken*
    vocab_file merge_file *parallel* *overlap* *comm* *recompute* *offload* *fp8* *fp4* bf16 fp16 *_dtype *seed*
    *attention_mask* *position_ids* eod* *fusion* *fused* *inference* *cuda_graph* attention_backend *flash_attn*
    init_method* *perform_initialization* *timing* *profile* exit_* *nccl* distributed_* *dist_* use_mcore_models
    is_hybrid_model use_cpu_* model_provider
    moe_token_dispatcher_type moe_grouped_gemm moe_permute* moe_enable_deepep
    moe_router_dtype moe_expert_capacity_factor moe_pad* moe_per_layer* moe_layer_* qk_clip* *rerun* *straggler*
    num_workers *deterministic* use_te* *mem_eff_path *manual_gc* finetune nproc_* nnodes node_rank master_* rdzv_*
    no_masked_softmax_fusion apply_query_key_layer_scaling attention_softmax_in_fp32 *timeout* mock_*
    *persist_layer_norm* *sequence_packing* rl_* *prompt* num_dataset* te_* cache_mla_latents
    temperature top_k top_p num_tokens_* max_tokens_* output_path incoming_* no_record_* *_decode *_prefill export_*
    *optim* ddp_* *gloo* sft
    """.split()
)


@cache
def spellings() -> dict[str, tuple[str, bool]]:
    """Every way to write an argument, with `_` -> its name, and whether it says the opposite."""
    found = {name: (name, False) for name in FLAGS} | {old: (name, False) for old, name in ALIASES.items()}
    for name, flag in FLAGS.items():
        if flag.flag:
            found[plain(flag.flag)] = (name, False)
        if flag.off:
            found[plain(flag.off)] = (name, True)
            # Megatron takes both spellings of most.
            found.setdefault(f"no_{name}", (name, True))
            found.setdefault(f"disable_{name}", (name, True))
    return found


def plain(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def neutral(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in NEUTRAL)


def flag_of(name: str, value: Any) -> list[str]:
    """The words of a command line that say it; none where it is so unless said."""
    flag = FLAGS[name]
    if flag.says == BOOL:
        if value == flag.default:
            return []
        return [flag.off if flag.default else flag.flag or f"--{name.replace('_', '-')}"]
    if value is None:
        return []
    words = value if isinstance(value, tuple) and value and isinstance(value[0], str) else (_shown(value),)
    return [flag.flag or f"--{name.replace('_', '-')}", *words]


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and set(value) - {0, 1}:
        return ",".join(map(str, value))
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return repr(value) if isinstance(value, float) and not value.is_integer() else str(value).removesuffix(".0")
