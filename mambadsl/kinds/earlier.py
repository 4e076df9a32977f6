"""A stream that keeps the states at which blocks of layers began: what the residual form `attend` declares, and the
`narrow` of that name (Attention Residuals, arXiv:2603.15031; Inkling 2). No torch.

The streams, n of d_model channels, are s_0, ..., s_(n-2), the states at which blocks began (s_0 is the embedding where
the first layer begins one), and last p, what the block at hand has added up. A layer reads
sum_i softmax_i(scale q . k_i) s_i over all of them, with a learned query q and keys k_i = rmsnorm(s_i); it adds its
output to p or, where it begins a block, leaves p as one more state, and its output is the new p. Where there is one
state (n = 1) there is nothing to choose: it is read as it is, and the layer has no query.
"""

from __future__ import annotations

from mambadsl.kinds.fields import Field, Flag, OneOf, OrWord, Real
from mambadsl.kinds.kind import ONES, ZEROS, Flops, Init, Saved, Weight, mixing
from mambadsl.kinds.values import Values, Variant

NORM_EPS = Field("norm_eps", Real(above=0), 1e-6, "added to the mean square of the streams before the root")
#: What `attend` is about, in a layer and before the head. The defaults are the paper's.
ATTENDING = (
    Field("reads", OneOf("states", "keys"), "states", "what the shares are of: the states, or the keys (Inkling 2)"),
    Field("scale", OrWord("auto", Real(above=0)), 1, "of the logits; auto: 1 / sqrt(d_model) (Inkling 2)"),
    Field("weight", Flag(), True, "the keys' norm has a learned scale per channel"),
    NORM_EPS,
)
BEGINS = Field("begins", Flag(), False, "the layer begins a block: the state before it is kept")


def attend_weights(below: str, form: Variant, d: int, n: int) -> tuple[Weight, ...]:
    """form: `attend`, of a layer or of `narrow`; n: the states it chooses from."""
    if n == 1:
        return ()
    keys = (_wide(f"{below}.keys.weight", d, ONES),) if form.weight else ()
    return _wide(f"{below}.query", d, ZEROS), *keys


def _wide(name: str, d: int, init: Init) -> Weight:
    return Weight(name, (d,), init, fp32=True, decay=False, quantise=False)


def attend_flops(n: int, d: int) -> Flops:
    """The query with each state, and their sum."""
    return mixing(0 if n == 1 else 4 * n * d)


def layer_weights(sub: Values, d: int, n: int) -> tuple[Weight, ...]:
    return attend_weights("residual", sub.residual, d, n)


def layer_flops(sub: Values, d: int, n: int) -> Flops:
    return attend_flops(n, d)


def layer_saved(sub: Values, d: int, n: int) -> Saved:
    """What the block has added up, as this layer reads it: states above are those of layers above. Of each state, its
    root mean square, logit and share."""
    return Saved(0) if n == 1 else Saved(d, 3 * n)
