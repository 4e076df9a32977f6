"""The resolved model: every name looked up, every default filled in, every value typed.

Still folded as the text is (groups and repeats); `graph.unroll` lays it out. Equality compares what
the model is, not where it was written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from mambadsl.kinds.fields import Field, Flag, Int, OneOf, OrWord, Real
from mambadsl.kinds.streams import NARROW, NARROWINGS
from mambadsl.kinds.sublayer import EMBEDDING_NORM, NORM
from mambadsl.kinds.values import Values
from mambadsl.syntax import tables, tree
from mambadsl.text.source import Span

MODEL_FIELDS: tuple[Field, ...] = (
    Field("vocab", Int(), 32768, "rows of the embedding table", "tokens"),
    Field("d_model", Int(), 1024, "width of the residual stream", "channels"),
    Field(
        "context", Int(), 4096, "tokens of a training sequence; the length that costs are given for", "tokens",
        inert=True,
    ),
    Field(
        "norm", NORM, NORM.convert_word("rmsnorm"),
        "norm of every layer that does not say otherwise, and the last",
    ),
    Field("tie_embeddings", Flag(), False, "the head uses the embedding table"),
    Field("embedding_multiplier", Real(), 1, "scale of the embeddings"),
    Field(
        "embedding_norm", EMBEDDING_NORM, EMBEDDING_NORM.convert_word("none"),
        "norm of the embeddings, before the first layer (RWKV); affine: a learned shift and scale by channel (Zaya)",
    ),
    Field(
        "meta_tokens", Int(0, 65536), 0,
        "learned vectors before the tokens of each document, at its positions from 0 (Hymba)", "tokens",
    ),
    Field(
        "narrow", NARROW, NARROW.convert_word("mean"),
        "what makes one residual stream of several before the final norm: "
        + "; ".join(f"{name}: {way.says}" for name, way in NARROWINGS.items()),
    ),
    Field("logits_multiplier", Real(), 1, "scale of the logits"),
    Field(
        "logits_softcap", OrWord("none", Real(above=0)), None,
        "logits are squashed to cap * tanh(logit / cap)",
    ),
    Field("residual_dtype", OneOf("model", "fp32"), "model", "dtype of the residual stream", inert=True),
    Field("init_std", Real(above=0), 0.02, "standard deviation of initial projection weights", inert=True),
    Field(
        "scale_residual_init", Flag(), True,
        "projections back onto the residual stream start smaller, by sqrt(number of residual additions)",
        inert=True,
    ),
)

MTP_FIELDS: tuple[Field, ...] = (
    Field("depths", Int(1, 16), 1, "how many tokens ahead, one after the other", "tokens"),
    Field(
        "weights", OneOf("own", "shared"), "own",
        "own: each depth has its weights; shared: all use the same",
    ),
    Field("loss_weight", Real(0), 0.1, "what the mean of the depths' losses is added to the loss with", inert=True),
)


@dataclass(frozen=True)
class Origin:
    """Where a value came from. how: "given" (span: the argument), "default", or "set" (--set)."""

    how: str
    span: Span | None = None


@dataclass(frozen=True)
class Mixer:
    """One branch: a kind with all its fields. name: the layer name it was declared under, if any.
    chain: the places that led here, innermost first: where the kind is written, the layer's name where it
    is declared, imported, and in changed copies."""

    kind: str
    fields: Values
    branch: Values
    name: str | None = field(default=None, compare=False)
    span: Span | None = field(default=None, compare=False, repr=False)
    origins: dict[str, Origin] = field(default_factory=dict, compare=False, repr=False)
    chain: tuple[Span, ...] = field(default=(), compare=False, repr=False)

    def __hash__(self) -> int:
        return hash((self.kind, self.fields, self.branch))


@dataclass(frozen=True)
class LayerSpec:
    """One residual sublayer: a mixer, or a sum of several behind one norm."""

    branches: tuple[Mixer, ...]
    sub: Values
    name: str | None = field(default=None, compare=False)
    span: Span | None = field(default=None, compare=False, repr=False)
    origins: dict[str, Origin] = field(default_factory=dict, compare=False, repr=False)

    def __hash__(self) -> int:
        return hash((self.branches, self.sub))

    @property
    def label(self) -> str:
        """For people: `M`, `M+A`, or the kinds' names."""
        return self.name or "+".join(b.name or b.kind for b in self.branches)


@dataclass(frozen=True)
class Use:
    """A layer at one place of a pattern."""

    layer: LayerSpec
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Block:
    """A group, a repeat or a named block: `items` `count` times. shared: the name of a `shared` item,
    whose layers have one set of weights for all uses. chain: where its name is declared and imported.
    layers, depth, cut: how many layers in all, how many blocks inside one another, and the first cut inside,
    known without laying anything out."""

    items: tuple[Element, ...]
    count: int = 1
    name: str | None = None
    shared: str | None = None
    span: Span | None = field(default=None, compare=False, repr=False)
    chain: tuple[Span, ...] = field(default=(), compare=False, repr=False)
    layers: int = field(init=False, compare=False)
    depth: int = field(init=False, compare=False)
    cut: Cut | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.count * count_layers(self.items))
        inner = max((item.depth for item in self.items if isinstance(item, Block)), default=0)
        object.__setattr__(self, "depth", inner + 1)
        object.__setattr__(self, "cut", first_cut(self.items))


def count_layers(elements: tuple[Element, ...]) -> int:
    """Layers that a row of elements lays out."""
    return sum(1 if isinstance(e, Use) else e.layers if isinstance(e, Block) else 0 for e in elements)


@dataclass(frozen=True)
class Cut:
    """A pipeline stage ends here."""

    span: Span | None = field(default=None, compare=False, repr=False)


Element: TypeAlias = "Use | Block | Cut"


def first_cut(elements: tuple[Element, ...]) -> Cut | None:
    cuts = (e if isinstance(e, Cut) else e.cut if isinstance(e, Block) else None for e in elements)
    return next((cut for cut in cuts if cut is not None), None)


@dataclass(frozen=True)
class MtpSpec:
    """The multi-token-prediction tail: depths blocks of these items."""

    settings: Values
    items: tuple[Element, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PartChoice:
    """One line of a parts block. path: `mamba2.scan` or `W.core`; args: raw values, lists as tuples."""

    path: str
    part: str
    args: tuple[tuple[str, Any], ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PartsSpec:
    name: str
    base: str | None
    choices: tuple[PartChoice, ...]
    span: Span | None = field(default=None, compare=False, repr=False)


#: What `expect` lines can speak of, beside constants and settings (computed by graph.checks.expects).
FACTS = (
    "layers", "stages", "params", "active_params", "flops_per_token", "kv_bytes_per_token", "state_bytes",
)


@dataclass(frozen=True)
class ExpectSpec:
    """A fact to check: the line, and what names mean in its file."""

    node: tree.Expect
    scope: Any = field(compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class ModelSpec:
    name: str
    settings: Values
    stack: tuple[Element, ...]
    mtp: MtpSpec | None = None
    parts: tuple[PartsSpec, ...] = ()
    expects: tuple[ExpectSpec, ...] = ()
    origins: dict[str, Origin] = field(default_factory=dict, repr=False)
    file: tree.File | None = field(default=None, repr=False)


def is_name(text: str) -> bool:
    """Whether a model can be called that."""
    return re.fullmatch("[a-z_][a-z0-9_]*", text) is not None and text not in tables.load().keywords


def name_of(source: str) -> str:
    """A model's name from its file's: `Tiny-2.mdl` -> tiny_2; a legal name, whatever the file is called."""
    stem = re.sub(r"[^a-z0-9]+", "_", Path(source).stem.lower()).strip("_")
    if not stem or stem[0].isdigit() or stem in tables.load().keywords:
        stem = f"model_{stem}".rstrip("_")
    return stem if stem != "model" else "a_model"
