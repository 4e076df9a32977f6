"""What every layer has around its mixer, whatever its kind: norm, residual form, multipliers.

The layer computes, for the default form, x + out_multiplier * f(in_multiplier * norm(x)). In a sum
(`M + A`) the branches share one norm and one residual form; multipliers are each branch's own. The residual forms are
in `residual.py`.
"""

from __future__ import annotations

from mambadsl.kinds.fields import Computed, Field, Flag, Int, Items, OneForm, OneOf, OrWord, Real
from mambadsl.kinds.kind import ZEROS, Init, Weight, norm_weights
from mambadsl.kinds.residual import AFFINE, FORMS, RESIDUAL_FORMS, form_of
from mambadsl.kinds.values import Values

_EPS = Field("eps", Real(above=0), 1e-5, "added to the mean square (or variance) before the root")
_WEIGHT = Field("weight", Flag(), True, "has a learned scale per channel")

NORM = OneForm(
    rmsnorm=(
        _EPS,
        _WEIGHT,
        Field("zero_centered", Flag(), False, "the scale is 1 + weight (Gemma, Qwen3-Next)"),
    ),
    layernorm=(_EPS, _WEIGHT, Field("bias", Flag(), True, "has a learned shift per channel (where it has a scale)")),
    none=(),
)
EMBEDDING_NORM = OneForm(**NORM.forms, **{AFFINE.name: ()})

ADAPTER = OneForm(
    none=(),
    lora=(
        Field("rank", Int(1), 16, "rank of the two factors"),
        Field(
            "targets", OrWord("all", Items(OneOf("in_proj", "out_proj", "qkv_proj", "o_proj", "up_proj", "down_proj"))),
            None, "which projections get one",
        ),
        Field(
            "per", OneOf("projection", "segment"), "projection",
            "what has two factors of its own: the projection, or each part fused in it, as q, k and v (Zamba2)",
        ),
    ),
)

#: Fields that belong to the whole sublayer: in a sum they are the sum's, not a branch's.
SUBLAYER_FIELDS: tuple[Field, ...] = (
    Field(
        "norm", NORM, Computed("the model's norm", lambda v, model: model.norm),
        "norm of the input (and output, for sandwich)",
    ),
    Field(
        "residual", RESIDUAL_FORMS, RESIDUAL_FORMS.convert_word("pre"),
        "; ".join(f"{name}: {form.says}" for name, form in FORMS.items()),
    ),
    Field(
        "input", OneOf("stream", "with_embedding"), "stream",
        "what it reads: the residual stream, or that joined with the first embedding (Zamba)",
    ),
    Field("recompute", Flag(), False, "compute the layer again in the backward pass instead of keeping it", inert=True),
)

#: Fields that each branch of a sum has for itself.
BRANCH_FIELDS: tuple[Field, ...] = (
    Field("in_multiplier", Real(), 1, "scale of the normed input"),
    Field("out_multiplier", Real(), 1, "scale of the output, before the sum and, in post and sandwich, the outer norm"),
    Field("dropout", Real(0, 0.99), 0, "share of outputs dropped in training", inert=True),
    Field("adapter", ADAPTER, ADAPTER.convert_word("none"), "per-use low-rank weights, for shared layers"),
)

#: Fields that may be changed where a shared layer is used.
PER_USE_FIELDS = ("adapter",)


def input_width(sub: Values, d_model: int) -> int:
    return 2 * d_model if sub.input == "with_embedding" else d_model


def sublayer_weights(sub: Values, d_model: int, streams: int) -> tuple[Weight, ...]:
    """Of one sublayer, without its branches: of its norms, and of its residual form. streams: that it reads."""
    form = form_of(sub.residual)
    widths = {form.before: input_width(sub, d_model), form.after: d_model}
    norms = (w for name, width in widths.items() if name for w in norm_weights(name, sub.norm, width))
    return (*norms, *form.weights(sub, d_model, streams))


def adapter_weights(branch: Values, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """Low-rank factors beside the projections they adapt: `adapter.<projection>.{down,up}`. Factors of segments lie one
    after another along the output axis, as the segments do."""
    found = []
    for w in adapted_weights(branch, weights):
        projection = w.name.removesuffix(".weight")
        (out, in_), rank = w.shape, branch.adapter.rank
        segments = w.segments if branch.adapter.per == "segment" else ()
        low = tuple((name, rank) for name, _ in segments)
        down, up = f"adapter.{projection}.down.weight", f"adapter.{projection}.up.weight"
        found.append(Weight(down, (rank * max(1, len(low)), in_), Init("normal"), low))
        found.append(Weight(up, (out, rank), ZEROS, segments, stretches=w.cuts))
    return tuple(found)


def adapted_weights(branch: Values, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """The projections that the branch's adapter is for."""
    adapter = branch.adapter
    if adapter.name == "none":
        return ()
    found = []
    for w in weights:
        projection = w.name.removesuffix(".weight")
        if len(w.shape) != 2 or not projection.endswith("_proj"):
            continue
        if adapter.targets is not None and not any(projection.endswith(t) for t in adapter.targets):
            continue
        found.append(w)
    return tuple(found)
