"""Mamba, Falcon-Mamba and Mamba-2 (Codestral too): layers of one kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mambadsl.hf import mixers
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import FP32_STREAM, dt_limit, expand, norm
from mambadsl.hf.family import Family, Layer, Recipe, fixed

SETTINGS = dict(
    vocab="vocab_size", d_model="hidden_size", norm=norm("layer_norm_epsilon"), tie_embeddings="tie_word_embeddings",
    residual_dtype=FP32_STREAM,
)
SHARED = dict(
    d_state="state_size", d_conv="conv_kernel", bias="use_bias", conv_bias="use_conv_bias", dt_min="time_step_min",
    dt_max="time_step_max", dt_floor="time_step_floor",
)
MAMBA1 = dict(d_inner="intermediate_size", dt_rank="time_step_rank") | SHARED


def layers(c: Settings) -> Iterator[Layer]:
    for i in range(c.num_hidden_layers):
        at = f"backbone.layers.{i}"
        yield Layer(("M",), (f"{at}.mixer",), f"{at}.norm.weight")


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    return {"num_hidden_layers": len(rows)}


def _family(model_type: str, architecture: str, recipe: Recipe, derived: Any = None) -> Family:
    return Family(
        model_type, architecture, SETTINGS, {"M": recipe}, layers, order, demands={"hidden_act": "silu"},
        embed="backbone.embeddings.weight", final="backbone.norm_f.weight", derived=derived,
        # Mamba-2 has no low-rank dt.
        follows=("expand", "time_step_rank"),
    )


EXPAND = expand("expand", lambda m: m.d_inner)
FAMILIES = (
    _family("mamba", "MambaForCausalLM", Recipe("mamba1", MAMBA1, mixers.mamba1), EXPAND),
    _family(
        "falcon_mamba", "FalconMambaForCausalLM",
        Recipe("mamba1", MAMBA1 | dict(dt_bc_norm=norm("mixer_rms_eps", "weightless")), mixers.mamba1), EXPAND,
    ),
    _family(
        "mamba2", "Mamba2ForCausalLM",
        Recipe(
            "mamba2",
            SHARED | dict(
                heads="num_heads", head_dim="head_dim", groups="n_groups", chunk="chunk_size",
                norm_eps="layer_norm_epsilon", dt_limit=dt_limit(), gated_norm=fixed("after_gate"),
            ),
            mixers.mamba2,
        ),
        expand("expand", lambda m: m.heads * m.head_dim),
    ),
)
