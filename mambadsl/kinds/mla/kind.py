"""Multi-head latent attention (MLA): keys and values of all heads come from one narrow vector a token, which is all
that decoding keeps.

DeepSeek-AI, "DeepSeek-V2", 2024. Behaviour matches the full attention of Kimi Linear (without rope) and of Ling 3.0
(rope of neighbouring channels, a gate for each head). A head's queries and keys are nope_dim channels that carry no
position and rope_dim that may; the latter of the keys are shared by all heads.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.attention.kind import ROPE_SCALING, mean_context
from mambadsl.kinds.fields import Computed, Field, Int, OneForm, OneOf, OrWord, Real
from mambadsl.kinds.kind import (
    ONES,
    RESIDUAL,
    Dims,
    Flops,
    Kind,
    Saved,
    Slot,
    State,
    Weight,
    divided,
    linear,
    matmul,
    mixing,
)
from mambadsl.kinds.values import Values

ROPE = OneForm(
    none=(),
    rope=(
        Field("theta", Real(above=0), 10000, "base of the rotation frequencies"),
        Field(
            "pairs", OneOf("half", "interleaved"), "half",
            "channels that turn together: i and i + rope_dim / 2, or neighbours (DeepSeek, Ling)",
        ),
        Field(
            "scaling", ROPE_SCALING, ROPE_SCALING.convert_word("none"), "how frequencies stretch for long contexts"
        ),
    ),
)

FIELDS = (
    Field("value_dim", Int(), 128, "channels of one head's values", "channels"),
    Field(
        "heads", Int(), Computed("d_model // value_dim", lambda v, model: max(1, model.d_model // v.value_dim)),
        "heads; heads * value_dim is free of d_model",
    ),
    Field("nope_dim", Int(), 128, "channels of one head's queries and keys that rope leaves alone", "channels"),
    Field("rope_dim", Int(), 64, "channels of one head's queries, and of all heads' keys, that rope turns", "channels"),
    Field("kv_rank", Int(), 512, "width of the latent that keys and values come from", "channels"),
    Field("q_rank", OrWord("none", Int()), None, "width of a latent that queries come from, or none", "channels"),
    Field("rope", ROPE, ROPE.convert_word("none"), "rotary position embedding, or none"),
    Field("scale", OrWord("auto", Real(above=0)), None, "scale of the scores; auto: (nope_dim + rope_dim) ** -0.5"),
    Field(
        "out_gate", OneOf("none", "elementwise", "per_head"), "none",
        "what the heads give is scaled by sigmoid of a projection: of each channel, of each head (Ling 3.0)",
    ),
    Field("norm_eps", Real(above=0), 1e-6, "eps of the RMS norms of the latents"),
)


def qk_dim(f: Values) -> int:
    """Channels of one head's queries and keys."""
    return f.nope_dim + f.rope_dim


def v_dim(f: Values) -> int:
    return f.heads * f.value_dim


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    gate = {"none": 0, "elementwise": v_dim(f), "per_head": f.heads}[f.out_gate]
    entries = ("q", f.q_rank or f.heads * qk_dim(f)), ("latent", f.kv_rank), ("k_rope", f.rope_dim)
    return (*entries, ("gate", gate)) if gate else entries


def kv_segments(f: Values) -> tuple[tuple[str, int], ...]:
    return ("k", f.heads * f.nope_dim), ("v", v_dim(f))


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    segments, kv = in_segments(f), kv_segments(f)
    table = [*linear("in_proj", sum(n for _, n in segments), dims.d_in, segments=segments, tp="out")]
    if f.q_rank:
        table.append(Weight("q_norm.weight", (f.q_rank,), ONES, decay=False, quantise=False))
        table += linear("q_proj", f.heads * qk_dim(f), f.q_rank, tp="out")
    return (
        *table,
        Weight("latent_norm.weight", (f.kv_rank,), ONES, decay=False, quantise=False),
        *linear("kv_proj", sum(n for _, n in kv), f.kv_rank, segments=kv, tp="out"),
        *linear("o_proj", dims.d_model, v_dim(f), init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """Of each token the latent, and the keys' rope_dim channels after it."""
    return (State("latent", (f.kv_rank + f.rope_dim,), per_token=True),)


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections, and 2 products (scores, values) over the tokens seen; the backward pass of the core does 5 (flash
    attention computes the scores again), 3 of them as wide as the keys."""
    matrices = [w.elements for w in weights(f, dims) if len(w.shape) == 2]
    core = 2 * f.heads * (qk_dim(f) + f.value_dim) * mean_context(length, None)
    backward = Fraction(3 * qk_dim(f) + 2 * f.value_dim, qk_dim(f) + f.value_dim)
    return matmul(*matrices) + mixing(core, backward=backward)


def saved(f: Values, dims: Dims) -> Saved:
    """Input, in_proj's output, queries of two projections, keys and values of all heads, the core's output and one
    log-sum-exp per head."""
    queries = f.heads * qk_dim(f) if f.q_rank else 0
    entries = sum(n for _, n in in_segments(f)) + f.heads * qk_dim(f) + v_dim(f)
    return Saved(dims.d_in + entries + queries + v_dim(f), f.heads)


def split(f: Values, ranks: int) -> Values | None:
    """By heads; every rank has the latents."""
    return divided(f, ranks, "heads")


KIND = Kind(
    name="mla",
    example="mla(heads=4, nope_dim=64, rope_dim=32, value_dim=64, kv_rank=128)",
    letter="L",
    color="#e8a87c",
    doc="multi-head latent attention: keys and values from a narrow latent",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("in_proj", "x_BTD -> [q | latent | k_rope | gate]"),
        Slot("core", "softmax(scale * q k^T + mask) v with packed documents, of all heads or in the latent"),
        Slot("o_proj", "back to d_model"),
    ),
    source="arXiv:2405.04434; Hugging Face KimiLinearAttention, BailingHybridAttention",
    attends=True,
)
