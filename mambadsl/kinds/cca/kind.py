"""Compressed convolutional attention: queries and keys pass two short convolutions, values look one token back.

Zyphra, arXiv:2510.04476. Behaviour matches Hugging Face transformers' Zaya. Letters: H query heads, K key/value heads,
P head_dim.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.attention.kind import HEAD_FIELDS, kv_dim, mean_context, q_dim
from mambadsl.kinds.fields import Field, Flag, Int
from mambadsl.kinds.kind import (
    RESIDUAL,
    ZEROS,
    Dims,
    Flops,
    Init,
    Kind,
    Saved,
    Slot,
    State,
    Weight,
    linear,
    matmul,
    mixing,
)
from mambadsl.kinds.values import Values

FIELDS = (
    *HEAD_FIELDS,
    Field("d_conv", Int(1, 64), 2, "taps of the convolution of each channel of queries and keys", "tokens"),
    Field("d_head_conv", Int(1, 64), 2, "taps of the convolution behind it, across the channels of a head", "tokens"),
    Field("bias", Flag(), False, "qkv_proj and o_proj have biases"),
)


def qk_dim(f: Values) -> int:
    return q_dim(f) + kv_dim(f)


def in_segments(f: Values) -> tuple[tuple[str, int], ...]:
    """v_next: what the next token has as the second half of its values."""
    half = kv_dim(f) // 2
    return ("q", q_dim(f)), ("k", kv_dim(f)), ("v", half), ("v_next", half)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """head_conv: a matrix [P, P] for each tap of each head. temperature: scale of each key head, whose keys are
    vectors of length 1 but for sqrt(P); at 0, attention is a mean."""
    conv_init = Init.of("uniform", bound=f.d_conv**-0.5)
    head_init = Init.of("uniform", bound=(f.head_dim * f.d_head_conv) ** -0.5)
    channels, heads = (("q", q_dim(f)), ("k", kv_dim(f))), (("q", f.heads), ("k", f.kv_heads))
    conv, inner = dict(segments=channels, quantise=False, tp="heads"), in_segments(f)
    shape = (f.heads + f.kv_heads, f.head_dim, f.head_dim, f.d_head_conv)
    return (
        *linear("qkv_proj", sum(n for _, n in inner), dims.d_in, bias=f.bias, segments=inner, tp="out"),
        Weight("conv.weight", (qk_dim(f), f.d_conv), conv_init, **conv),
        Weight("conv.bias", (qk_dim(f),), conv_init, decay=False, **conv),
        Weight("head_conv.weight", shape, head_init, heads, quantise=False, tp="heads"),
        Weight("head_conv.bias", (qk_dim(f),), head_init, decay=False, **conv),
        Weight("temperature", (f.kv_heads,), ZEROS, fp32=True, decay=False, quantise=False, tp="heads"),
        *linear("o_proj", dims.d_model, q_dim(f), bias=f.bias, init=RESIDUAL, tp="in"),
    )


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    """Keys and values of past tokens; the last inputs of both convolutions; the last token's v_next."""
    past = (State(name, (f.kv_heads, f.head_dim), per_token=True, window=f.window) for name in ("k", "v"))
    convs = (State(name, (qk_dim(f), taps - 1)) for name, taps in (("conv", f.d_conv), ("head_conv", f.d_head_conv)))
    return *past, *convs, State("v_next", (kv_dim(f) // 2,))


def flops(f: Values, dims: Dims, length: int) -> Flops:
    """Matrices, taps of convolutions, and the core as attention's."""
    matrices = matmul(*(w.elements for w in weights(f, dims) if len(w.shape) > 1))
    return matrices + mixing(4 * q_dim(f) * mean_context(length, f.window), backward=Fraction(5, 2))


def saved(f: Values, dims: Dims) -> Saved:
    """Input, projections, what each convolution gives, q and k normed, the core's output and one log-sum-exp a head."""
    return Saved(dims.d_in + 4 * qk_dim(f) + kv_dim(f) + q_dim(f), f.heads)


KIND = Kind(
    name="cca",
    example="cca(heads=4, kv_heads=2, head_dim=64)",
    letter="A",
    color="#f7b58a",
    doc="compressed convolutional attention (Zaya)",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    slots=(
        Slot("qkv_proj", "x_BTD -> [q | k | v | v_next]"),
        Slot("conv", "causal depthwise convolution of q and k without activation, its last inputs as state"),
        Slot("head_conv", "causal convolution across the channels of each head, its last inputs as state"),
        Slot("core", "softmax(scale * q k^T + mask) v with window and packed documents"),
        Slot("o_proj", "back to d_model"),
    ),
    source="arXiv:2510.04476; Hugging Face ZayaAttention",
    attends=True,
)
