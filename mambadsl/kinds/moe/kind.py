"""Mixture of experts: a router sends each token to top_k of `experts` feed-forward experts.

Routers as in Jamba, Granite 4 H, Mixtral (softmax) and DeepSeek-V3, Nemotron 3, Kimi (sigmoid with a
selection bias, groups of experts, renormalisation and a scale), Zaya (an MLP that may choose no expert at all);
shared experts; a latent width that the routed experts work in (Nemotron 3 Super). Every token is kept: no capacity,
nothing dropped. What evens the experts' loads in training is declared here, and done by `kinds/balance.py`.
"""

from __future__ import annotations

from fractions import Fraction

from mambadsl.kinds.fields import Computed, Field, Flag, Int, OneForm, OneOf, OrWord, Real
from mambadsl.kinds.kind import (
    NORMAL,
    ONES,
    RESIDUAL,
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
)
from mambadsl.kinds.mlp.kind import ACT
from mambadsl.kinds.values import Values

_RENORM_EPS = Field("renorm_eps", Real(0), 0, "added to the sum when weights are renormalised")
_SCALE = Field("scale", Real(), 1, "scale of the weights of the chosen experts")

ROUTER = OneForm(
    softmax=(
        Field(
            "order", OneOf("before_top_k", "after_top_k"), "before_top_k",
            "softmax over all experts and then choose, or choose and then softmax over the chosen (Granite)",
        ),
        Field("renorm", Flag(), False, "weights of the chosen experts are divided by their sum"),
        _RENORM_EPS,
        _SCALE,
    ),
    sigmoid=(
        Field(
            "bias", Flag(), True,
            "a bias per expert, for choosing only (kept in float32, not trained by gradients)",
        ),
        Field("groups", Int(), 1, "experts are in so many groups"),
        Field(
            "top_groups", Int(), 1,
            "only experts of this many best groups (by the sum of their best two) are chosen",
        ),
        Field("renorm", Flag(), True, "weights of the chosen experts are divided by their sum"),
        Field("renorm_eps", Real(0), 1e-20, "added to the sum when weights are renormalised"),
        _SCALE,
    ),
    mlp=(
        Field("d_router", Int(), 256, "width of the router", "channels"),
        Field("eps", Real(above=0), 1e-5, "eps of the norm before its MLP"),
        Field("skip", Flag(), True, "one choice more: no expert, which adds nothing"),
        Field(
            "carry", OneOf("none", "first", "next"), "none",
            "first: what the MLP reads is handed to the routers below; next: that of the router above is added, scaled",
        ),
    ),
)

FIELDS = (
    Field("experts", Int(), 8, "number of routed experts"),
    Field("top_k", Int(), 2, "experts that each token goes to"),
    Field(
        "d_ff", Int(), Computed("4 * d_model", lambda v, model: 4 * model.d_model),
        "hidden width of one expert", "channels",
    ),
    Field("act", ACT, "silu", "activation of all experts"),
    Field("gated", Flag(), False, "gated experts: act(gate(x)) * up(x)"),
    Field("router", ROUTER, ROUTER.convert_word("softmax"), "how experts are scored, chosen and weighted"),
    Field(
        "shared_d_ff", Int(0), 0, "hidden width of the expert that every token passes; 0: none", "channels"
    ),
    Field(
        "shared_gate", OneOf("none", "sigmoid"), "none",
        "scale of the shared expert's output by a learned gate",
    ),
    Field("latent", OrWord("none", Int()), None, "width that the routed experts work in", "channels"),
    Field("aux_loss", Real(0), 0, "what the load-balancing loss is added to the loss with, in training", inert=True),
    Field("z_loss", Real(0), 0, "what the router's z-loss is added to the loss with, in training", inert=True),
    Field(
        "bias_rate", Real(0), 0,
        "the router's bias goes up by this after each step for experts that had too few tokens, else down", inert=True,
    ),
)


def weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    share = Fraction(min(f.top_k, f.experts), f.experts)
    inner_in, inner_out = (f.latent, f.latent) if f.latent else (dims.d_in, dims.d_model)
    up_name, wide = ("gate_up_proj", 2) if f.gated else ("up_proj", 1)
    segments = (("gate", f.d_ff), ("up", f.d_ff)) if f.gated else ()
    table = list(router_weights(f, dims))
    if f.latent:
        table += linear("latent_in_proj", f.latent, dims.d_in)
    table += [
        Weight(
            f"experts.{up_name}", (f.experts, wide * f.d_ff, inner_in), NORMAL, segments,
            active=share, tp="expert",
        ),
        Weight("experts.down_proj", (f.experts, inner_out, f.d_ff), RESIDUAL, active=share, tp="expert"),
    ]
    if f.latent:
        table += linear("latent_out_proj", dims.d_model, f.latent, init=RESIDUAL)
    if f.shared_d_ff:
        shared = (("gate", f.shared_d_ff), ("up", f.shared_d_ff)) if f.gated else ()
        table += linear(f"shared.{up_name}", wide * f.shared_d_ff, dims.d_in, segments=shared, tp="out")
        table += linear("shared.down_proj", dims.d_model, f.shared_d_ff, init=RESIDUAL, tp="in")
        if f.shared_gate == "sigmoid":
            table += linear("shared_gate", 1, dims.d_in)
    return tuple(table)


def choices(f: Values) -> int:
    """The experts, and what else a router can choose."""
    return f.experts + f.router.values.get("skip", False)


def router_weights(f: Values, dims: Dims) -> tuple[Weight, ...]:
    """router.bias is for choosing only. Of `mlp`: what the MLP reads, router.enter of x and router.carry_scale times
    what the router above read, is normed; then come fc1 and fc2, and router.weight is the last layer."""
    fixed = dict(fp32=True, decay=False, trained=False, quantise=False)
    if f.router.name != "mlp":
        found = (Weight("router.weight", (f.experts, dims.d_in), NORMAL, quantise=False),)
        biased = f.router.name == "sigmoid" and f.router.bias
        return (*found, Weight("router.bias", (f.experts,), ZEROS, **fixed)) if biased else found
    width, layers = f.router.d_router, []
    for name, read in ("enter", dims.d_in), ("fc1", width), ("fc2", width):
        layers.append(Weight(f"router.{name}.weight", (width, read), NORMAL, quantise=False))
        layers.append(Weight(f"router.{name}.bias", (width,), ZEROS, decay=False, quantise=False))
    small = dict(decay=False, quantise=False)
    return (
        *layers,
        *((Weight("router.carry_scale", (width,), ONES, **small),) if f.router.carry == "next" else ()),
        Weight("router.norm.weight", (width,), ONES, **small),
        Weight("router.weight", (choices(f), width), NORMAL, quantise=False),
        Weight("router.bias", (choices(f),), Init.of("ending", last=-1) if f.router.skip else ZEROS, **fixed),
    )


def gives(f: Values, dims: Dims) -> tuple[Carried, ...]:
    carries = f.router.values.get("carry", "none") != "none"
    return (Carried("router", (f.router.d_router,), fp32=True),) if carries else ()


def takes(f: Values, dims: Dims) -> tuple[Carried, ...]:
    carries = f.router.values.get("carry") == "next"
    return (Carried("router", (f.router.d_router,), fp32=True),) if carries else ()


def state(f: Values, dims: Dims) -> tuple[State, ...]:
    return ()


def flops(f: Values, dims: Dims, length: int) -> Flops:
    return matmul(*(w.elements * w.active for w in weights(f, dims) if len(w.shape) > 1))


def saved(f: Values, dims: Dims) -> Saved:
    """Input, each chosen expert's input and hidden values, the shared expert's hidden values, scores; again for a loss
    of them."""
    wide, scores = 2 if f.gated else 1, choices(f) * (1 + bool(f.aux_loss) + bool(f.z_loss))
    inner = f.latent or dims.d_in
    routed = f.top_k * (inner + wide * f.d_ff) + (f.latent or 0)
    return Saved(dims.d_in + routed + wide * f.shared_d_ff, scores + 4 * f.router.values.get("d_router", 0))


def split(f: Values, ranks: int) -> Values | None:
    """Every rank has a part of every expert."""
    return divided(f, ranks, "d_ff", "shared_d_ff")


KIND = Kind(
    name="moe",
    example="moe(experts=4, top_k=2, d_ff=256)",
    letter="E",
    color="#f4b6c9",
    doc="mixture of feed-forward experts",
    fields=FIELDS,
    weights=weights,
    state=state,
    flops=flops,
    saved=saved,
    split=split,
    gives=gives,
    takes=takes,
    slots=(
        Slot("router", "scores, choice and weights of experts, in float32"),
        Slot("experts", "the routed experts' two products over tokens sorted by expert"),
        Slot("shared", "the shared expert"),
    ),
    source="arXiv:2401.04088, arXiv:2412.19437; Hugging Face ZayaRouter",
)
