"""Residual forms: how a layer reads the stream and adds to it. One row of `FORMS` for each; no torch.

With f(h) what the layer's branches give together, and norms as the layer's field `norm` says. What a form computes is
in `build/residual.py`, a class for each row.

`aside` (Zamba's shared block): the layer adds nothing to the stream, and what it gives, t, goes beside the stream to
the next layer. One that is aside too reads t in place of the stream, any other reads x + t and adds to x.

`hyper`, `mhc` and `gated` have several streams: see `streams.py`; `attend` has more the deeper it is: see `earlier.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mambadsl.kinds import earlier
from mambadsl.kinds.fields import Field, OneForm, Real
from mambadsl.kinds.kind import Flops, Saved, Weight, mixing, norm_weights
from mambadsl.kinds.streams import (
    EPS,
    ITERATIONS,
    RANK,
    STREAMS,
    gated_flops,
    gated_saved,
    gated_weights,
    hyper_flops,
    hyper_weights,
    mhc_flops,
    mhc_weights,
    mixed_saved,
)
from mambadsl.kinds.values import Values, Variant


@dataclass(frozen=True)
class Form:
    """says: what it computes. fields: its arguments. before, after: the names of its norms before and behind the
    branches, "" for none. adds: to the stream. keeps_normed: what goes on is the normed input, which must be as wide as
    the stream. Of a sublayer's values, d_model and the streams that it reads: weights, its own, named from `residual.`
    on; flops of its own work; saved beside what norms and branches keep."""

    says: str
    fields: tuple[Field, ...] = ()
    before: str = "norm"
    after: str = ""
    adds: bool = True
    keeps_normed: bool = False
    weights: Callable[[Values, int, int], tuple[Weight, ...]] = lambda sub, d_model, streams: ()
    flops: Callable[[Values, int, int], Flops] = lambda sub, d_model, streams: mixing(0)
    saved: Callable[[Values, int, int], Saved] = lambda sub, d_model, streams: Saved(0)


#: No norm, but a learned shift and then a scale of each channel: (x + bias) * weight.
AFFINE = Variant("affine")
#: What `residual=affine` shifts and scales: the layer's output, and the stream.
AFFINE_TERMS = "residual.out_affine", "residual.stream_affine"


def _affine_weights(sub: Values, d: int, streams: int) -> tuple[Weight, ...]:
    return tuple(w for name in AFFINE_TERMS for w in norm_weights(name, AFFINE, d))


FORMS: dict[str, Form] = {
    "pre": Form("x + f(norm(x))"),
    "post": Form("x + norm(f(x))", before="", after="norm"),
    "sandwich": Form("x + norm2(f(norm1(x)))", after="post_norm"),
    "normed": Form(
        "alpha*h + beta*f(h) with h = norm(x)",
        (
            Field("alpha", Real(), 1, "scale of the normed input on the residual stream"),
            Field("beta", Real(), 1, "scale of the layer's output"),
        ),
        keeps_normed=True,
    ),
    "affine": Form("(f(norm(x)) + b1)*s1 + (x + b2)*s2, learned by channel", weights=_affine_weights),
    "aside": Form("adds nothing, the next layer reads f(norm(x)) as well", adds=False),
    # Hyper-connections (arXiv:2409.19606).
    "hyper": Form(
        "x_j = sum_i mix_ij x_i + post_j f(norm(sum_i pre_i x_i)), each token's weights by tanh",
        (STREAMS, earlier.NORM_EPS), weights=hyper_weights, flops=hyper_flops, saved=mixed_saved,
    ),
    # Manifold-constrained hyper-connections (arXiv:2512.24880), as DeepSeek-V4 and GLM have them.
    "mhc": Form(
        "the same with sigmoids, and a mix whose rows and columns sum to 1",
        (STREAMS, ITERATIONS, EPS, earlier.NORM_EPS), weights=mhc_weights, flops=mhc_flops, saved=mixed_saved,
    ),
    # Gated residual streams (Qwen4-Exp).
    "gated": Form(
        "x_j + post_j f(mean_i(gate_i norm_i(x_i))), gates of each channel", (STREAMS, RANK),
        before="", weights=gated_weights, flops=gated_flops, saved=gated_saved,
    ),
    # Attention residuals (arXiv:2603.15031; Inkling 2).
    "attend": Form(
        "p + f(norm(sum_i softmax_i(q . rmsnorm(s_i)) s_i)) over p and the states at which blocks began",
        (earlier.BEGINS, *earlier.ATTENDING),
        weights=earlier.layer_weights, flops=earlier.layer_flops, saved=earlier.layer_saved,
    ),
}

RESIDUAL_FORMS = OneForm(**{name: form.fields for name, form in FORMS.items()})


def form_of(residual: Variant) -> Form:
    return FORMS[residual.name]

