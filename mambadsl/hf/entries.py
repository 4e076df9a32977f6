"""Entries that many families' tables share: activations, norms, rotary embeddings, limits, streams."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mambadsl.adapt.table import Unlike
from mambadsl.hf.config import Settings
from mambadsl.hf.family import Both, Layer, key, words
from mambadsl.kinds.values import NONE, Values, Variant

ACTS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu2": "relu2", "relu": "relu",
}
FP32_STREAM = words("residual_in_fp32", {True: "fp32", False: "model"})

#: Settings of a rotary embedding: ours by the name of the form of scaling, and theirs.
_FACTOR = {"factor": "factor"}
_ORIGINAL = {"original_context": "original_max_position_embeddings"}
SCALINGS = {
    "linear": _FACTOR,
    "dynamic": _FACTOR | _ORIGINAL,
    "llama3": _FACTOR | _ORIGINAL | {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "yarn": _FACTOR | _ORIGINAL | {
        "beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor",
    },
}
#: Settings of theirs that change nothing in text, or follow from others.
_ROPE_NEUTRAL = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}


def act(name: str = "hidden_act") -> Both:
    return words(name, ACTS)


def form(name: str, **fields: Any) -> Variant:
    """A form of a field, with the defaults for what is not given."""
    return Variant(name, Values(fields)) if fields else Variant(name)


def norm(name: str = "rms_norm_eps", form_: str = "rmsnorm", **more: Any) -> Both:
    """An RMS norm by its eps: of layers, or of other things (`form_`)."""
    return key(name, lambda eps: form(form_, eps=eps, **more), lambda v: getattr(v, "eps", None))


def dt_limit(name: str = "time_step_limit") -> Both:
    return key(
        name, lambda v: tuple(None if n == math.inf else n for n in v) if v is not None else (0, None),
        lambda v: [float(v[0]), math.inf if v[1] is None else float(v[1])],
    )


def router(form_: str, *, also: Mapping[str, Any] | None = None, **names: str) -> Both:
    """A router of this form: fields of ours by the names of their settings. also: what is always so."""

    def read(c: Settings) -> Variant:
        return form(form_, **(also or {}), **{ours: getattr(c, theirs) for ours, theirs in names.items()})

    def write(value: Variant) -> dict[str, Any]:
        return {theirs: getattr(value, ours, None) for ours, theirs in names.items() if ours in value.values}

    return Both(tuple(names.values()), read, write)


def rope(name: str = "rope_parameters", part: str | None = None) -> Both:
    """part: of settings by type of layer, those of this one. A theta of null is no rotation."""

    def read(c: Settings) -> Variant:
        given = getattr(c, name)
        return read_rope((given or {}).get(part) if part else given)

    def write(value: Variant) -> dict[str, Any]:
        return {name: {part: write_rope(value)} if part else write_rope(value)}

    return Both((name,), read, write)


def read_rope(given: dict[str, Any] | None) -> Variant:
    if not given or given.get("rope_theta") is None:
        return NONE
    kind = given.get("rope_type") or given.get("type") or "default"
    # Turns pairs across the whole head, and lets the slow ones stand still.
    name = "proportional" if kind == "proportional" else "rope"
    kind = "default" if kind == name else kind
    known = SCALINGS.get(kind, {})
    if kind != "default" and not known:
        raise Unlike(f"has the type `{kind}`; with a counterpart: `default`, " + ", ".join(f"`{k}`" for k in SCALINGS))
    if kind == "yarn":
        given = _sharp(given)
    if strange := given.keys() - _ROPE_NEUTRAL - set(known.values()):
        raise Unlike(f"of the type `{kind}` has `{min(strange)}`, which has no counterpart")
    scaling = {} if kind == "default" else {"scaling": form(kind, **{
        ours: given[theirs] for ours, theirs in known.items() if given.get(theirs) is not None
    })}
    return form(name, theta=given["rope_theta"], fraction=given.get("partial_rotary_factor") or 1, **scaling)


def _sharp(given: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's two settings of how sharp attention stays, as the one factor that follows from both."""
    given = dict(given)
    if given.get("truncate", True) is True:
        given.pop("truncate", None)
    mscale, everywhere = (given.pop(name, None) for name in ("mscale", "mscale_all_dim"))
    if given.get("attention_factor") is None and mscale and everywhere:
        given["attention_factor"] = sharpness(given["factor"], mscale) / sharpness(given["factor"], everywhere)
    return given


def sharpness(factor: float, mscale: float) -> float:
    """What yarn multiplies queries and keys by, as DeepSeek does."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def write_rope(value: Variant) -> dict[str, Any]:
    if value.name == "none":
        return {"rope_type": "default", "rope_theta": None}
    scaling = value.scaling
    plain = "proportional" if value.name == "proportional" else "default"
    found = {"rope_type": plain if scaling.name == "none" else scaling.name, "rope_theta": float(value.theta)}
    if getattr(value, "fraction", 1) != 1:
        found["partial_rotary_factor"] = value.fraction
    for ours, theirs in SCALINGS.get(scaling.name, {}).items():
        if getattr(scaling, ours) is not None:
            found[theirs] = getattr(scaling, ours)
    return found


def head_dim(c: Settings) -> int:
    """Channels of a head of attention, where the family may say how many, or never does."""
    return c.get("head_dim") or c.hidden_size // c.num_attention_heads


def expand(name: str, inner: Callable[[Values], int]) -> Callable[[Mapping[str, Values], Values], dict[str, int]]:
    """For `Family.derived`: how many times as wide as the model its layers of Mamba are (recipe M) inside."""
    return lambda fields, model: {name: inner(fields["M"]) // model.d_model} if "M" in fields else {}


def bfloat16(value: float) -> float:
    """The nearest number that bfloat16 has (ties to even)."""
    [bits] = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def pairs(
    mixers: Sequence[tuple[str, str]], feeds: Sequence[tuple[str, str]], *, base: str = "model.layers",
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"), first: int = 0,
) -> Iterator[Layer]:
    """Blocks of a mixer and a feed-forward layer. mixers, feeds: (recipe, path below the block). first: block's
    number."""
    for i, (mixer, feed) in enumerate(zip(mixers, feeds, strict=True), first):
        for (recipe, path), before in zip((mixer, feed), norms):
            at = f"{base}.{i}"
            yield Layer((recipe,), (f"{at}.{path}" if path else at,), f"{at}.{before}.weight")


def by_type(rows: Sequence[tuple[str, ...]], recipes: Mapping[str, str], feeds: str) -> dict[str, Any]:
    """For `Family.order`: blocks by the types of their mixers. recipes: their type -> the recipe of the mixer."""
    back = {recipe: name for name, recipe in recipes.items()}
    mixing, _ = apart(rows, feeds)
    return {"num_hidden_layers": len(mixing), "layer_types": [back[name] for name in mixing]}


def apart(rows: Sequence[tuple[str, ...]], feeds: str) -> tuple[list[str], list[str]]:
    """The mixers and the feed-forward layers (of the recipes `feeds`) of a row in which they take turns."""
    names = ["+".join(row) for row in rows]
    for i, name in enumerate(names):
        if (name in tuple(feeds)) != bool(i % 2):
            turn = "a feed-forward layer" if i % 2 else "a layer that mixes tokens"
            raise Unlike(f"stack.{i} must be {turn}: the family's layers take turns")
    if len(names) % 2:
        raise Unlike("the last layer must be a feed-forward layer: the family's layers take turns")
    return names[::2], names[1::2]
