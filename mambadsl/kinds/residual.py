"""Residual forms: how a layer reads the stream and adds to it. One row of `FORMS` for each; no torch.

With f(h) what the layer's branches give together, and norms as the layer's field `norm` says. What a form computes is
in `build/residual.py`, a class for each row.

`aside` (Zamba's shared block): the layer adds nothing to the stream, and what it gives, t, goes beside the stream to
the next layer. One that is aside too reads t in place of the stream, any other reads x + t and adds to x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mambadsl.kinds.fields import Field, OneForm, Real
from mambadsl.kinds.kind import Weight
from mambadsl.kinds.values import Variant


@dataclass(frozen=True)
class Form:
    """says: what it computes. fields: its arguments. before, after: the names of its norms before and behind the
    branches, "" for none. weights(residual, d_model): its own, named from `residual.` on. adds: to the stream.
    keeps_normed: what goes on is the normed input, which must be as wide as the stream."""

    says: str
    fields: tuple[Field, ...] = ()
    before: str = "norm"
    after: str = ""
    weights: Callable[[Variant, int], tuple[Weight, ...]] = lambda residual, d_model: ()
    adds: bool = True
    keeps_normed: bool = False


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
    "aside": Form("adds nothing, the next layer reads f(norm(x)) as well", adds=False),
}

RESIDUAL_FORMS = OneForm(**{name: form.fields for name, form in FORMS.items()})


def form_of(residual: Variant) -> Form:
    return FORMS[residual.name]
