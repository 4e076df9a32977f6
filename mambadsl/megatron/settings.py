"""Megatron's arguments of the whole model: what is a setting of ours, what must be so, and what all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambadsl.adapt.table import Both, Entry, Unlike, key, words
from mambadsl.kinds.values import Values, Variant
from mambadsl.megatron.arguments import Arguments, Missing
from mambadsl.megatron.layers import needed

#: Specs whose layers are those of `layers.py`.
SPECS = ("hybrid_stack_spec", "mamba_stack_spec", "hybrid_inference_stack_spec", "mamba_inference_stack_spec")
SPEC = ("megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec")


def _norm(c: Arguments) -> Variant:
    centered = c.layernorm_zero_centered_gamma
    if c.normalization == "RMSNorm":
        return Variant("rmsnorm", Values(eps=c.layernorm_epsilon, zero_centered=centered))
    if c.normalization != "LayerNorm":
        raise Unlike(f"is `{c.normalization}`; with a counterpart: `RMSNorm`, `LayerNorm`")
    if centered:
        raise Unlike("is `LayerNorm` with a scale of 1 + weight; `RMSNorm` can have that here")
    return Variant("layernorm", Values(eps=c.layernorm_epsilon))


def _write_norm(value: Variant) -> dict[str, Any]:
    return {
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}.get(value.name, value.name),
        "layernorm_epsilon": getattr(value, "eps", None),
        "layernorm_zero_centered_gamma": bool(value.values.get("zero_centered")),
    }


def _vocab(c: Arguments) -> int:
    """Rows of the table: padded so that tensor ranks share them."""
    if c.padded_vocab_size is not None:
        return c.padded_vocab_size
    multiple = c.make_vocab_size_divisible_by * c.tensor_model_parallel_size
    if c.vocab_size is None:
        raise Missing("vocab_size", ": without it Megatron asks the tokenizer")
    return -(-c.vocab_size // multiple) * multiple


SETTINGS: dict[str, Entry] = {
    "vocab": Both(("vocab_size",), _vocab, lambda v: {"vocab_size": v, "make_vocab_size_divisible_by": 1}),
    "d_model": needed("hidden_size"),
    "context": Both(
        ("seq_length",), lambda c: c.seq_length or c.max_position_embeddings or 4096,
        lambda v: {"seq_length": v, "max_position_embeddings": v},
    ),
    "norm": Both(("normalization",), _norm, _write_norm),
    "tie_embeddings": key("untie_embeddings_and_output_weights", lambda v: not v, lambda v: not v),
    "residual_dtype": words("fp32_residual_connection", {False: "model", True: "fp32"}),
    "init_std": "init_method_std",
}
#: Fields of every layer, beside its kind's.
SHARED: dict[str, Entry] = {"dropout": "hidden_dropout"}
#: Arguments that must be so. The text says what else would happen.
DEMANDS: Mapping[str, tuple[Any, str]] = {
    "rotary_interleaved": (False, "turns neighbouring channels"),
    "qk_l2_norm": (False, "norms queries and keys without weights"),
    "softmax_type": ("vanilla", "changes the softmax"),
    "use_mup": (False, "scales by widths"),
    "apply_residual_connection_post_layernorm": (False, "adds what is normed already"),
    "glu_linear_offset": (0, "shifts what is gated"),
    "activation_func_clamp_value": (None, "clamps activations"),
    "experimental_attention_variant": (None, "changes attention"),
    "enable_hyper_connections": (False, "has several residual streams"),
    "mtp_hsm": (False, "mixes what predicts further tokens"),
    "mla_down_proj_fusion": (False, "names tensors otherwise"),
    "heterogeneous_layers_config_path": (None, "has layers of several sizes"),
    "use_rope_scaling": (False, "is left out by hybrid models without a word"),
}


def spec(c: Arguments) -> None:
    """Raises Unlike for a spec whose layers are others."""
    if c.spec is not None and c.spec[-1] not in SPECS:
        raise Unlike(f"is `{c.spec[-1]}`, whose layers have no counterpart; `{SPECS[0]}`'s have")
