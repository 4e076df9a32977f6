"""The protocol: what a kind declares, and everything else reads. No torch.

Grammar, checks, costs, caches, checkpoints, converters and docs read these tables; no other place
lists kinds. Letters in comments: B batch, T time, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from mambadsl.kinds.fields import Field
from mambadsl.kinds.values import Values


@dataclass(frozen=True)
class Dims:
    """Widths that come from outside a layer. d_in: what it reads (d_model, or 2 * d_model where the
    first embedding is read too); d_model: what it adds to the residual stream."""

    d_model: int
    d_in: int


@dataclass(frozen=True)
class Init:
    """A law for initial values. law is one of the names in `build/init.py`:

    normal(std=None: the model's init_std, idle=0: so many last rows are zeros) · uniform(bound) · zeros · ones ·
    const(value) · ramp(low, high): evenly from one to the other · ending(last): zeros, and one other at the end
    a_uniform(low, high): log of U(low, high) · a_arange(): log(1..d_state) in each row
    dt_bias(low, high, floor): inverse softplus of exp(U(log low, log high)), at least floor
    radius(low, high): exp(-softplus(it)) squared is U(low^2, high^2)
    lambda_start(): 0.8 - 0.6 exp(-0.3 l) in the l-th layer that mixes tokens, from 0 on
    shift_share(power, rise): (i / n)^(power (1 - depth)) + rise depth of channel i of n, depth from 0 to 1
    decay_speeds(): -5 + 8 (i / (n - 1))^(0.7 + 1.3 depth) · zigzag(): log 0.3 and 0.5 less, as much, 0.5 more in turn
    one_stream(streams): the l-th layer reads stream l mod N alone, adds to each, and leaves all as they are
    slopes(): 2^(-8 h / H) of head h = 1, ... H, less the deeper the layer: next to nothing in the last
    """

    law: str
    args: tuple[tuple[str, float], ...] = ()
    #: A projection back onto the residual stream: std is divided by sqrt(number of residual additions).
    residual: bool = False

    @classmethod
    def of(cls, law: str, *, residual: bool = False, **args: float) -> Init:
        return cls(law, tuple(args.items()), residual)


NORMAL = Init("normal")
RESIDUAL = Init("normal", residual=True)
ZEROS, ONES = Init("zeros"), Init("ones")


@dataclass(frozen=True)
class Weight:
    """One tensor of a layer, declared once.

    name: path below the layer (`in_proj.weight`). segments: logical parts along the output
    axis (0; 1 of stacked experts [E, out, in]), by name and size, that tensor parallelism and converters
    split by. fp32: stays float32 whatever the model's dtype. decay: weight decay applies. trained: False
    for buffers that are saved but have no gradient (they do not count as parameters). quantise: may be
    stored in 8 or 4 bits. active: the share of its elements that one token uses (top_k of experts). tp:
    how tensor parallelism splits it: "out" (axis 0, by segment), "in" (axis 1), "heads" (axis 0),
    "expert" (axis 0), "none". stretches: sizes along the output axis that it is split by, where not the segments.
    """

    name: str
    shape: tuple[int, ...]
    init: Init = NORMAL
    segments: tuple[tuple[str, int], ...] = ()
    fp32: bool = False
    decay: bool = True
    trained: bool = True
    quantise: bool = True
    active: Fraction = Fraction(1)
    tp: str = "none"
    stretches: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Sizes along the output axis of which tensor ranks have a share each; none: all of it is one."""
        return self.stretches or tuple(size for _, size in self.segments)


@dataclass(frozen=True)
class State:
    """One tensor of a layer's decoding state, for one sequence.

    shape: without the batch axis. per_token: the tensor has one such entry for each past token
    (keys, values), at most `window` of them and the first `keep`. fp32: kept in float32 unless asked otherwise.
    first_innermost: where memory is fixed, the first axis of `shape` lies innermost in it, as kernels read it fastest.
    """

    name: str
    shape: tuple[int, ...]
    per_token: bool = False
    window: int | None = None
    keep: int = 0
    fp32: bool = False
    first_innermost: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Carried:
    """A tensor [B, T, *shape] that a layer hands, past the residual stream, to layers below it.

    A layer that takes it by its name gets that of the nearest layer above that gives the name; both declare the same
    shape. Without `fp32` it has the dtype that the layer computes in. optional: of what is taken; where no layer above
    gives it, the layer gets None. kept: takers read it of past tokens too; modules hand on a `Seen` (kinds/past.py)
    with entries of these names, which are the parts of the first axis of `shape` and states of the giver.
    """

    name: str
    shape: tuple[int, ...]
    fp32: bool = False
    optional: bool = False
    kept: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return prod(self.shape)


def nothing(f: Values, dims: Dims) -> tuple[Carried, ...]:
    return ()


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one token (a multiply-add is 2). The backward pass is split as
    zero-bubble schedules split it: gradients of inputs, gradients of weights."""

    forward: Fraction
    backward_input: Fraction
    backward_weight: Fraction

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )

    @property
    def backward(self) -> Fraction:
        return self.backward_input + self.backward_weight


def matmul(*elements: int | Fraction) -> Flops:
    """FLOPs of matrix products with weights of so many (active) elements: 2 forward, 2 + 2 backward."""
    n = 2 * sum(map(Fraction, elements), Fraction(0))
    return Flops(n, n, n)


def mixing(forward: int | Fraction, *, backward: Fraction = Fraction(2)) -> Flops:
    """FLOPs of work without weights (scans, attention cores): backward is so many times forward."""
    forward = Fraction(forward)
    return Flops(forward, forward * backward, Fraction(0))


@dataclass(frozen=True)
class Saved:
    """Elements per token that the fused forward pass keeps for the backward pass: `narrow` in the
    compute dtype (2 bytes in bf16), `wide` in float32."""

    narrow: int
    wide: int = 0


@dataclass(frozen=True)
class Slot:
    """A place that a part fills. Its definition is the pure-torch function in the kind's module.py.

    covers: narrower slots that it does the work of, where it is filled. optional: it may stay empty, for the
    narrower ones do the same (a fused step, say); it has no function of its own then.
    """

    name: str
    doc: str
    covers: tuple[str, ...] = ()
    optional: bool = False


#: The slot of kinds that have a fused step.
STEP = Slot(
    "step", "one token in decoding, from residual stream to residual stream: norm, mixer, addition", optional=True
)


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    weights(f, dims), state(f, dims), flops(f, dims, length), saved(f, dims): the tables, from field
    values. `length` is the number of tokens of a training sequence; FLOPs are the mean over its tokens.
    gives(f, dims), takes(f, dims): what goes past the residual stream, to layers below and from layers above. A module
    gets what it takes by keyword; one that gives something returns (y_BTD, {name: tensor}).
    recurrent: carries order along the sequence without position embeddings (rules W701, I702). local: sees the last
    few tokens only (I704). attends: compares each token with those before it, in an order that `rope`, a field that it
    has, may tell (W701, I702, I704, I705, W211, E207, W501).
    letter: its usual layer name, for text written by programs. color: its fill in pictures, light.
    example: a small layer that every kernel takes; of a kind that takes something, with the layer that gives it.
    module_code: where the torch module is, `module:Class` or a function that returns the class; of the kinds shipped,
    `Module` in the folder's module.py.
    split(f, ranks): the fields of one rank's part of a layer that so many compute together; None where it has no such
    parts. The layer gives the sum of what they give, a bias behind a weight that is split "in" added once; what such a
    weight gives inside of a layer goes through the module's `summed`, and must have no bias; the mean of squares of a
    norm over what several ranks have goes through its `averaged`. A part's own tables tell what it has: a segment (or
    stretch) as large as the layer's is on all ranks, of a smaller one each rank has its own, in order; where there are
    more ranks than different ones, neighbours have the same.
    """

    name: str
    doc: str
    fields: tuple[Field, ...]
    weights: Callable[[Values, Dims], tuple[Weight, ...]]
    state: Callable[[Values, Dims], tuple[State, ...]]
    flops: Callable[[Values, Dims, int], Flops]
    saved: Callable[[Values, Dims], Saved]
    slots: tuple[Slot, ...] = ()
    source: str = ""
    gives: Callable[[Values, Dims], tuple[Carried, ...]] = nothing
    takes: Callable[[Values, Dims], tuple[Carried, ...]] = nothing
    recurrent: bool = False
    local: bool = False
    attends: bool = False
    letter: str = "X"
    color: str = ""
    example: str = ""
    module_code: str | Callable[[], Any] = ""
    split: Callable[[Values, int], Values | None] = lambda f, ranks: None

    def field(self, name: str) -> Field | None:
        return next((f for f in self.fields if f.name == name), None)

    def slot_of(self, projection: str) -> str | None:
        """The slot that multiplies by `<projection>.weight`, if there is one. (gate_up_proj, where a gate is fused with
        it, is up_proj's.)"""
        return next((s.name for s in self.slots if projection in (s.name, f"gate_{s.name}")), None)

    def module(self) -> Any:
        """The torch module class. Imports torch."""
        from importlib import import_module

        if callable(self.module_code):
            return self.module_code()
        module, _, name = (self.module_code or f"{self.package}.module:Module").partition(":")
        return getattr(import_module(module), name)

    @property
    def package(self) -> str:
        return f"mambadsl.kinds.{self.name}"


def divided(
    f: Values, ranks: int, *names: str, copied: tuple[str, ...] = (), cut: tuple[str, ...] = ()
) -> Values | None:
    """The fields with a `ranks`th of each of `names`, and of `copied` too, or 1 where several ranks have the same one,
    and of `cut` too, or the fraction 1/n where n ranks have a piece of one. None where a number does not divide."""
    if any(f[name] % ranks for name in names) or any(f[name] % ranks and ranks % f[name] for name in copied):
        return None
    shares = {name: Fraction(f[name], ranks) for name in cut}
    if any(1 not in share.as_integer_ratio() for share in shares.values()):
        return None
    return f.replace(
        **{name: f[name] // ranks for name in names}, **{name: max(1, f[name] // ranks) for name in copied},
        **{name: share if share < 1 else int(share) for name, share in shares.items()},
    )


def norm_weights(prefix: str, norm: Any, width: int) -> tuple[Weight, ...]:
    """The weights of a norm form (see `sublayer.NORM` and `residual.AFFINE`) over `width` channels."""
    if norm.name == "none" or not norm.values.get("weight", True):
        return ()
    init = ZEROS if norm.values.get("zero_centered", False) else ONES
    weight = Weight(f"{prefix}.weight", (width,), init, decay=False, quantise=False)
    if norm.values.get("bias", norm.name == "affine"):
        return weight, Weight(f"{prefix}.bias", (width,), ZEROS, decay=False, quantise=False)
    return (weight,)


def linear(
    name: str, out: int, in_: int, *, bias: bool = False, init: Init = NORMAL, tp: str = "none",
    segments: tuple[tuple[str, int], ...] = (), stretches: tuple[int, ...] = (),
) -> tuple[Weight, ...]:
    """`name.weight` [out, in] and, if asked for, `name.bias` [out]."""
    weight = Weight(f"{name}.weight", (out, in_), init, segments, tp=tp, stretches=stretches)
    if not bias:
        return (weight,)
    bias_tp = "none" if tp == "in" else tp
    return weight, Weight(
        f"{name}.bias", (out,), ZEROS, segments, decay=False, quantise=False, tp=bias_tp, stretches=stretches
    )
