"""xLSTM: matrix memories, each before an MLP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, nextafter
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.hf.config import Settings
from mambadsl.hf.entries import apart, norm, pairs
from mambadsl.hf.family import Both, Family, Layer, Recipe, fixed, read_only
from mambadsl.kinds.values import Values

#: Their cache rounds widths up to multiples of this, their layers do not.
STEP = 64
IN_PROJ = "q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact"


def _head(key: str) -> Both:
    """Channels of a head, from a share of the model's width."""
    def read(c: Settings) -> int:
        width = int(c.hidden_size * getattr(c, key))
        if width % STEP or width % c.num_heads:
            raise Unlike(f"gives {width} channels; they must be a multiple of {STEP} and of `num_heads`")
        return width // c.num_heads

    return read_only((key, "num_heads"), read)


def _d_ff(c: Settings) -> int:
    step = c.ffn_round_up_to_multiple_of
    return int((c.hidden_size * c.ffn_proj_factor + step - 1) // step * step)


def _width(c: Settings) -> int:
    if c.embedding_dim != c.hidden_size:
        raise Unlike(f"is {c.embedding_dim}; only that of `hidden_size`, {c.hidden_size}, has a counterpart")
    return c.hidden_size


def _share(width: int, d_model: int) -> float:
    """What gives `width` again, times `d_model` and rounded down."""
    share = width / d_model
    return share if int(d_model * share) == width else nextafter(share, inf)


def _derived(fields: Mapping[str, Values], model: Values) -> Mapping[str, Any]:
    f, d_ff = fields["X"], fields["F"].d_ff
    return {
        "qk_dim_factor": _share(f.heads * f.key_dim, model.d_model),
        "v_dim_factor": _share(f.heads * f.value_dim, model.d_model),
        "ffn_proj_factor": d_ff / model.d_model,
        # Rounding up to the width itself takes away what the share lacks.
        "ffn_round_up_to_multiple_of": STEP if d_ff % STEP == 0 else d_ff,
    }


RECIPES = {
    "X": Recipe(
        "mlstm",
        dict(
            heads="num_heads", key_dim=_head("qk_dim_factor"), value_dim=_head("v_dim_factor"), chunk="chunk_size",
            gate_softcap="gate_soft_cap", norm_eps="norm_eps", divisor_eps="eps",
        ),
        {
            "in_proj.weight": tuple(f"{name}.weight" for name in IN_PROJ), "input_bias": "igate_preact.bias",
            "forget_bias": "fgate_preact.bias", "head_norm.weight": "multihead_norm.weight",
        },
    ),
    "F": Recipe(
        "mlp",
        dict(
            d_ff=read_only(("ffn_proj_factor", "ffn_round_up_to_multiple_of"), _d_ff), act=fixed("silu"),
            gated=fixed(True),
        ),
        {"gate_up_proj.weight": ("proj_up_gate.weight", "proj_up.weight"), "down_proj.weight": "proj_down.weight"},
    ),
}


def layers(c: Settings) -> Iterator[Layer]:
    count = c.num_blocks
    yield from pairs(
        [("X", "mlstm_layer")] * count, [("F", "ffn")] * count, base="backbone.blocks",
        norms=("norm_mlstm", "norm_ffn"),
    )


def order(rows: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    mixing, _ = apart(rows, "F")
    return {"num_hidden_layers": len(mixing), "num_blocks": len(mixing)}


FAMILIES = (
    Family(
        "xlstm", "xLSTMForCausalLM",
        dict(
            vocab="vocab_size", norm=norm("norm_eps"), logits_softcap="output_logit_soft_cap",
            d_model=Both(("embedding_dim", "hidden_size"), _width, lambda v: {"hidden_size": v, "embedding_dim": v}),
            tie_embeddings="tie_word_embeddings",
        ),
        RECIPES, layers, order, derived=_derived,
        demands={"use_bias": False, "add_out_norm": True, "weight_mode": "single", "tie_word_embeddings": False},
        embed="backbone.embeddings.weight", final="backbone.out_norm.weight",
        follows=(
            # Ways to compute the same.
            "num_hidden_layers", "norm_reduction_force_float32", "chunkwise_kernel", "sequence_kernel", "step_kernel",
            "mode", "return_last_states", "autocast_kernel_dtype", "inference_state_dtype", "max_inference_chunksize",
        ),
    ),
)
