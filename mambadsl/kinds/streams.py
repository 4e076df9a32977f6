"""Several residual streams, x_1 to x_N, side by side in one tensor of N * d_model channels: what the residual forms
`hyper`, `mhc` and `gated` declare, and the model's `narrow`. No torch.

The embedding is copied into each stream. A layer reads one mixture of them and adds its output to each, by weights
that each token has of its own; before the head, `narrow` makes one stream of them.

`attend` begins with one stream and has one more after each layer that begins a block: see `earlier.py`. How many a
layer reads, the graph knows: n, in all that forms and ways to narrow declare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mambadsl.kinds.earlier import ATTENDING, NORM_EPS, attend_flops, attend_weights
from mambadsl.kinds.fields import Field, Int, OneForm, Real
from mambadsl.kinds.kind import NORMAL, ONES, ZEROS, Flops, Init, Saved, Weight, linear, matmul, mixing, norm_weights
from mambadsl.kinds.values import Values, Variant

STREAMS = Field("streams", Int(2, 64), 4, "residual streams; the same in every layer", "streams")
RANK = Field("rank", Int(1), 320, "width of the gates' bottleneck", "channels")
EPS = Field("eps", Real(0), 1e-6, "added to what is read from each stream, and to what is divided by")
ITERATIONS = Field("iterations", Int(1, 1000), 20, "how often columns are normalised; rows, once less")

#: The scale of what depends on the token starts small (arXiv:2409.19606, arXiv:2512.24880).
_SMALL = Init.of("const", value=0.01)


def segments(streams: int) -> tuple[tuple[str, int], ...]:
    """Weights of one token in `hyper` and `mhc`: what is read of each stream, what is added to each, and what goes
    from each stream (row) to each (column)."""
    return ("pre", streams), ("post", streams), ("mix", streams * streams)


def hyper_weights(sub: Values, d: int, n: int) -> tuple[Weight, ...]:
    return (
        _wide("residual.proj.weight", (n + 2, d), ZEROS, (("pre", 1), ("post", 1), ("mix", n)), decay=True),
        _wide("residual.bias", (n * (n + 2),), Init.of("one_stream", streams=n), segments(n)),
        _wide("residual.scale", (3,), _SMALL),
    )


def mhc_weights(sub: Values, d: int, n: int) -> tuple[Weight, ...]:
    return (
        _wide("residual.proj.weight", (n * (n + 2), n * d), NORMAL, segments(n), decay=True),
        _wide("residual.bias", (n * (n + 2),), ZEROS, segments(n)),
        _wide("residual.scale", (3,), _SMALL),
    )


def gated_weights(sub: Values, d: int, n: int) -> tuple[Weight, ...]:
    return (*_gates("residual", sub.norm, n, sub.residual.rank, d), *linear("residual.inject_proj", n, n * d))


def _gates(below: str, norm: Variant, n: int, rank: int, d: int) -> tuple[Weight, ...]:
    return (
        *norm_weights(f"{below}.norm", norm, n * d),
        *linear(f"{below}.down_proj", rank, n * d), *linear(f"{below}.up_proj", n * d, rank),
    )


def _wide(
    name: str, shape: tuple[int, ...], init: Init, parts: tuple[tuple[str, int], ...] = (), *, decay: bool = False
) -> Weight:
    return Weight(name, shape, init, parts, fp32=True, decay=decay, quantise=False)


def _projections(weights: tuple[Weight, ...]) -> int:
    return sum(w.elements for w in weights if len(w.shape) == 2)


def hyper_flops(sub: Values, d: int, n: int) -> Flops:
    # Each stream is projected by itself.
    return matmul(n * _projections(hyper_weights(sub, d, n))) + _mixed(n, d)


def mhc_flops(sub: Values, d: int, n: int) -> Flops:
    return matmul(_projections(mhc_weights(sub, d, n))) + _mixed(n, d)


def gated_flops(sub: Values, d: int, n: int) -> Flops:
    return matmul(_projections(gated_weights(sub, d, n)))


def _mixed(n: int, d: int) -> Flops:
    """From N streams one, and from N streams N."""
    return mixing(2 * n * d * (n + 1))


def mixed_saved(sub: Values, d: int, n: int) -> Saved:
    """The streams, what the layer gave, and each token's weights."""
    return Saved((n + 1) * d, n * (n + 2))


def gated_saved(sub: Values, d: int, n: int) -> Saved:
    """The streams and their gates."""
    return Saved(2 * n * d + sub.residual.rank + n)


def streams_of(sub: Values) -> int:
    """How many streams the embedding is copied into for a layer with these sublayer fields."""
    return sub.residual.values.get("streams", 1)


def begins(sub: Values) -> bool | None:
    """Whether the layer begins a block, and so gives a stream more than it reads. None: its form knows no blocks."""
    return sub.residual.values.get("begins")


@dataclass(frozen=True)
class Narrowing:
    """A way to make one stream of several. norms: it norms what it reads, and no final norm follows.
    weights(narrow, norm, streams, d_model): named from `narrow.` on. flops(streams, d_model): beside those of its
    projections."""

    says: str
    fields: tuple[Field, ...] = ()
    norms: bool = False
    weights: Callable[[Variant, Variant, int, int], tuple[Weight, ...]] = lambda narrow, norm, n, d: ()
    flops: Callable[[int, int], Flops] = lambda n, d: mixing(2 * n * d)


def _weighted_weights(narrow: Variant, norm: Variant, n: int, d: int) -> tuple[Weight, ...]:
    return (
        _wide("narrow.proj.weight", (n, n * d), NORMAL, decay=True),
        _wide("narrow.bias", (n,), ZEROS), _wide("narrow.scale", (1,), ONES),
    )


NARROWINGS: dict[str, Narrowing] = {
    "mean": Narrowing("mean(x_j)"),
    "sum": Narrowing("sum_j x_j"),
    "weighted": Narrowing("sum_j pre_j x_j, pre as in mhc (DeepSeek-V4)", (EPS, NORM_EPS), weights=_weighted_weights),
    "gated": Narrowing(
        "mean_j(gate_j norm_j(x_j)), in place of the final norm (Qwen4-Exp)", (RANK,), norms=True,
        weights=lambda narrow, norm, n, d: _gates("narrow", norm, n, narrow.rank, d),
    ),
    "attend": Narrowing(
        "by softmax of a learned query, as an `attend` layer reads (Attention Residuals)", ATTENDING,
        weights=lambda narrow, norm, n, d: attend_weights("narrow", narrow, d, n), flops=attend_flops,
    ),
}

NARROW = OneForm(**{name: way.fields for name, way in NARROWINGS.items()})


def narrow_weights(model: Values, streams: int) -> tuple[Weight, ...]:
    if streams == 1:
        return ()
    return NARROWINGS[model.narrow.name].weights(model.narrow, model.norm, streams, model.d_model)


def final_norm(model: Values, streams: int) -> Variant:
    """The norm between the (narrowed) stream and the head."""
    return Variant("none") if streams > 1 and NARROWINGS[model.narrow.name].norms else model.norm


def narrow_flops(model: Values, streams: int) -> Flops:
    if streams == 1:
        return mixing(0)
    own = NARROWINGS[model.narrow.name].flops(streams, model.d_model)
    return matmul(_projections(narrow_weights(model, streams))) + own
