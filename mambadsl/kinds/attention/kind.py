"""Causal softmax attention: multi-head, grouped or single key/value head.

Behaviour matches the attention of Jamba, Nemotron-H, Bamba, Falcon-H1, Granite 4 H, LFM2, OLMo Hybrid, Qwen3-Next and
Llama in Hugging Face transformers (rope: half-split pairs). head_dim is free of d_model / heads.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import isqrt

from mambadsl.kinds.fields import Computed, Field, Flag, Int, OneForm, OneOf, OrWord, Real
from mambadsl.kinds.kind import (
    ONES,
    RESIDUAL,
    STEP,
    ZEROS,
    Carried,
    Dims,
    Flops,
    Init,
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


@cache
def _usual_heads(d_model: int) -> int:
    """The most heads of at least 64 channels that divide d_model."""
    most = max(1, d_model // 64)
    low = [n for n in range(1, isqrt(d_model) + 1) if d_model % n == 0]
    return max(heads for n in low for heads in (n, d_model // n) if heads <= most)


_FACTOR = Field("factor", Real(above=0), 1, "how many times longer the context becomes")
_ORIGINAL = Field("original_context", Int(), 8192, "the context before scaling", "tokens")

#: Scalings as Hugging Face's ROPE_INIT_FUNCTIONS compute them.
ROPE_SCALING = OneForm(
    none=(),
    linear=(_FACTOR,),
    dynamic=(_FACTOR, _ORIGINAL),
    llama3=(
        _FACTOR,
        Field("low_freq_factor", Real(above=0), 1, "below: fully scaled"),
        Field("high_freq_factor", Real(above=0), 4, "above: not scaled"),
        _ORIGINAL,
    ),
    yarn=(
        _FACTOR,
        Field("beta_fast", Real(above=0), 32, "rotations above which nothing is scaled"),
        Field("beta_slow", Real(above=0), 1, "rotations below which all is scaled"),
        Field(
            "attention_factor", OrWord("auto", Real(above=0)), None,
            "scale of cos and sin; auto: 0.1 ln(factor) + 1, at least 1",
        ),
        _ORIGINAL,
    ),
)

_THETA = Field("theta", Real(above=0), 10000, "base of the rotation frequencies")
_PLAIN_SCALING = OneForm(none=(), linear=(_FACTOR,))

ROPE = OneForm(
    none=(),
    rope=(
        _THETA,
        Field("fraction", Real(0, 1, above=0), 1, "share of head_dim that is rotated, the first channels"),
        Field(
            "scaling", ROPE_SCALING, ROPE_SCALING.convert_word("none"),
            "how frequencies stretch for long contexts",
        ),
    ),
    proportional=(
        _THETA,
        Field("fraction", Real(0, 1, above=0), 1, "share of the head's pairs of channels that turn, the fastest ones"),
        Field(
            "scaling", _PLAIN_SCALING, _PLAIN_SCALING.convert_word("none"),
            "how frequencies stretch for long contexts",
        ),
    ),
)

_EPS = Field("eps", Real(above=0), 1e-6, "eps of the norm")
_CENTERED = Field("zero_centered", Flag(), False, "the scale is 1 + weight")
QK_NORM = OneForm(none=(), per_head=(_EPS, _CENTERED), full_width=(_EPS, _CENTERED))

DIFFERENTIAL = OneForm(
    none=(),
    halves=(
        Field("eps", Real(above=0), 1e-5, "eps of the norm behind the difference"),
        Field("weight", Flag(), True, "that norm has a learned scale, one for all heads"),
    ),
)

#: Heads, and what they see.
HEAD_FIELDS = (
    Field(
        "heads", Int(),
        Computed("d_model // 64, or the next below that divides d_model", lambda v, model: _usual_heads(model.d_model)),
        "query heads",
    ),
    Field(
        "kv_heads", Int(), Computed("heads", lambda v, model: v.heads),
        "key/value heads; each serves heads / kv_heads query heads",
    ),
    Field(
        "head_dim", Int(), Computed("d_model // heads", lambda v, model: max(1, model.d_model // v.heads)),
        "channels of one head", "channels",
    ),
    Field(
        "rope", ROPE, ROPE.convert_word("none"),
        "rotary position embedding, or none; proportional: the slow pairs of channels do not turn (LFM3)",
    ),
    Field(
        "window", OrWord("none", Int()), None,
        "a token sees itself and the window - 1 tokens before it", "tokens",
    ),
)
FIELDS = (
    *HEAD_FIELDS,
    Field(
        "keep", Int(0), 0, "the first tokens of each document are seen through any window (sinks; Hymba's meta tokens)",
        "tokens",
    ),
    Field("qk_norm", QK_NORM, QK_NORM.convert_word("none"), "RMS norm of queries and keys, before rope"),
    Field("scale", OrWord("auto", Real(above=0)), None, "scale of the scores; auto: head_dim ** -0.5"),
    Field("softcap", OrWord("none", Real(above=0)), None, "scores are squashed to cap * tanh(score / cap)"),
    Field("sinks", Flag(), False, "each head has a learned score that takes a share of its softmax and gives nothing"),
    Field(
        "differential", DIFFERENTIAL, DIFFERENTIAL.convert_word("none"),
        "halves: the second half of the heads, times a learned factor, is taken from the first; values twice as wide",
    ),
    Field(
        "out_gate", OneOf("none", "elementwise", "per_head"), "none",
        "what the heads give is scaled by sigmoid of a projection: of each channel (Qwen3-Next), of each head (LFM3)",
    ),
    Field("qkv_bias", Flag(), False, "qkv_proj has a bias"),
    Field("o_bias", Flag(), False, "o_proj has a bias"),
    Field("key_multiplier", Real(), 1, "scale of the keys, after their norm and before rope (Falcon-H1)"),
    Field("gives", OneOf("none", "kv"), "none", "kv: layers below can take its keys and values"),
    Field(
        "takes", OneOf("none", "kv"), "none",
        "kv: it has queries only, and reads the keys and values of the nearest layer above that gives them",
    ),
)


def q_dim(f: Values) -> int:
    return f.heads * f.head_dim


def kv_dim(f: Values) -> int:
    return f.kv_heads * f.head_dim


def gate_dim(f: Values) -> int:
    return {"none": 0, "elementwise": q_dim(f), "per_head": f.heads}[f.out_gate]


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    kv = (("k", kv_dim(f)), ("v", kv_dim(f))) if f.takes == "none" else ()
    gate = (("gate", gate_dim(f)),) if gate_dim(f) else ()
    return ("q", q_dim(f)), *kv, *gate


def halves(f: Values, size: int) -> tuple[int, ...]:
    """What tensor ranks have a share of, of so many channels of all heads: of differential ones either half."""
    return (size,) if f.differential.name == "none" else (size // 2, size // 2)


def rotary_dim(f: Values) -> int:
    """Channels of each head that rope takes in pairs (even)."""
    share = {"none": 0, "rope": f.rope.values.get("fraction"), "proportional": 1}[f.rope.name]
    return int(f.head_dim * share) // 2 * 2


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    q, kv, segments = q_dim(f), kv_dim(f), in_segments(f)
    width = sum(n for _, n in segments)
    # The gate is of what the two halves give together.
    cuts = tuple(size for name, n in segments for size in (halves(f, n) if name in "qkv" else (n,)))
    table = [*linear("qkv_proj", width, dims.d_in, bias=f.qkv_bias, segments=segments, tp="out", stretches=cuts)]
    if f.qk_norm.name != "none":
        full, init = f.qk_norm.name == "full_width", ZEROS if f.qk_norm.zero_centered else ONES
        for name, width in ("q_norm", q), *([("k_norm", kv)] if f.takes == "none" else []):
            shape = (width if full else f.head_dim,)
            cut = dict(tp="heads", stretches=halves(f, width)) if full else {}
            table.append(Weight(f"{name}.weight", shape, init, decay=False, quantise=False, **cut))
    if f.sinks:
        cuts = halves(f, f.heads)
        table.append(Weight("sinks", (f.heads,), fp32=True, decay=False, quantise=False, tp="heads", stretches=cuts))
    if f.differential.name != "none":
        # lambda: of both halves a query's and a key's vector; lambda_start: what their difference begins at, by depth.
        table += [
            Weight("lambda", (4, f.head_dim), Init.of("normal", std=0.1), fp32=True, decay=False, quantise=False),
            Weight("lambda_start", (1,), Init("lambda_start"), fp32=True, decay=False, trained=False, quantise=False),
        ]
        if f.differential.weight:
            table.append(Weight("sub_norm.weight", (2 * f.head_dim,), ONES, decay=False, quantise=False))
    table += linear("o_proj", dims.d_model, q, bias=f.o_bias, init=RESIDUAL, tp="in")
    return tuple(table)


def _kv(f: Values) -> tuple[Carried, ...]:
    return (Carried("kv", (2, f.kv_heads, f.head_dim), kept=("k", "v")),)


def gives(f: Values, dims: Dims) -> tuple[Carried, ...]:
    """Keys as queries meet them: after their norm and rope."""
    return _kv(f) if f.gives == "kv" else ()


def takes(f: Values, dims: Dims) -> tuple[Carried, ...]:
    return _kv(f) if f.takes == "kv" else ()


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """Keys and values taken from above are their giver's."""
    if f.takes == "kv":
        return ()
    shape = (f.kv_heads, f.head_dim)
    return tuple(State(name, shape, per_token=True, window=f.window, keep=f.keep) for name in ("k", "v"))


def mean_context(length: int, window: int | None, keep: int = 0) -> Fraction:
    """Mean number of tokens that a token of a sequence sees: the last `window`, itself included, and the first `keep`.
    """
    if window is None or window >= length:
        return Fraction(length + 1, 2)
    seen = window * (window + 1) // 2 + (length - window) * window
    # The k-th token outside of the window sees min(k, keep) more.
    outside = length - window
    few = min(outside, keep)
    return Fraction(seen + few * (few + 1) // 2 + (outside - few) * keep, length)


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Projections, and 2 products (scores, values) over the tokens seen, 3 with values twice as wide; the backward
    pass of the core does 5 products for 2 (flash attention computes the scores again)."""
    proj = matmul(dims.d_in * sum(n for _, n in in_segments(f)), q_dim(f) * dims.d_model)
    products = 6 if f.differential.name == "halves" else 4
    core = products * q_dim(f) * mean_context(length, f.window, f.keep)
    return proj + mixing(core, backward=Fraction(5, 2))


def saved(f: Values, dims: Dims) -> Saved:
    """Input, q, k, v (its own ones), the gate, the core's output and one log-sum-exp per head."""
    return Saved(dims.d_in + sum(n for _, n in in_segments(f)) + q_dim(f), f.heads)


def split(f: Values, ranks: int) -> Values | None:
    """By query heads, or pairs of differential ones; fewer key/value heads are on several ranks, norms over the full
    width are cut."""
    each = len(halves(f, 2))
    one = f.replace(heads=f.heads // each, kv_heads=f.kv_heads // each)
    part = divided(one, ranks, "heads", copied=("kv_heads",))
    return part and part.replace(heads=part.heads * each, kv_heads=part.kv_heads * each)


KIND = Kind(
    name="attention",
    example="attention(heads=4, kv_heads=2, head_dim=64)",
    letter="A",
    color="#f9c784",
    doc="causal softmax attention with grouped key/value heads",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    slots=(
        Slot("qkv_proj", "x_BTD -> [q | k | v | gate], without k and v where those are taken"),
        Slot("core", "softmax(scale * q k^T + mask) v with window, softcap and packed documents"),
        Slot("o_proj", "back to d_model"),
        STEP,
    ),
    source="Hugging Face transformers; rope: arXiv:2104.09864",
    gives=gives,
    takes=takes,
    attends=True,
)
