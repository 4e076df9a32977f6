"""What Transformer Engine's parts cannot do: reasons, none where a part fits the request. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.kinds import registry
from mambadsl.kinds.residual import form_of
from mambadsl.parts.part import Request

_FP8_SIDE = 16


def linear(request: Request) -> Iterator[str]:
    """Projections in bf16 or fp16; in FP8, widths that are multiples of 16."""
    if request.dtype == "fp32":
        yield "its products of fp32 are rounded to TF32"
    if request.args.get("fp8", False):
        yield from _uneven(request)


def norm_linear(request: Request) -> Iterator[str]:
    """As `linear`, after a norm that the layer's projection alone reads."""
    yield from linear(request)
    sub, branch = request.sub, request.branch
    norm = sub.norm
    if not request.alone:
        yield "the layers of a sum share one norm"
    form = form_of(sub.residual)
    if not form.before or form.keeps_normed:
        yield f"residual = {sub.residual.name}: the norm is not the projection's alone"
    if branch.in_multiplier != 1:
        yield f"in_multiplier = {branch.in_multiplier} stands between norm and projection"
    if branch.adapter.name != "none":
        yield f"the layer has an adapter, `{branch.adapter.name}`, which reads what is normed"
    if norm.name == "none":
        yield "there is no norm before the projection"
    elif not norm.weight or (norm.name == "layernorm" and not norm.bias):
        yield "it wants a norm with all its weights"


def attention(request: Request) -> Iterator[str]:
    """Heads of 8 to 256 channels, in eights."""
    if request.fields.head_dim % 8 or request.fields.head_dim > 256:
        yield f"head_dim must be a multiple of 8, at most 256, not {request.fields.head_dim}"
    if request.fields.softcap is not None:
        yield "it has no fused kernel with a softcap"
    if request.fields.keep:
        yield "its windows keep no first tokens"
    if request.fields.sinks:
        yield "its softmax is used without sinks"


def rms_norm(request: Request) -> Iterator[str]:
    """Any width, any dtype. Layers with another norm do not use it."""
    yield from ()


def _uneven(request: Request) -> Iterator[str]:
    name, _, slot = request.slot.partition(".")
    kind = registry.get(name)
    for weight in kind.weights(request.fields, request.dims):
        if kind.slot_of(weight.name.removesuffix(".weight")) == slot:
            for side in weight.shape:
                if side % _FP8_SIDE:
                    yield f"FP8 needs widths that are multiples of {_FP8_SIDE}; {weight.name} is {weight.shape}"
                    return
