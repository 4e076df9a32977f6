"""What the fused decoding step can do: the reasons against a request, one sentence each. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mambadsl.kinds.mamba2.kind import norm_ranks
from mambadsl.kinds.values import Values
from mambadsl.parts.triton.limits import WIDEST_NORM

WIDEST_STATE = 256
WIDEST_HEAD = 256


def step(request: Any) -> Iterator[str]:
    """request: of a slot `<kind>.step`, as `parts.part.Request`."""
    yield from _sublayer(request)
    kind = request.slot.partition(".")[0]
    yield from KINDS[kind](request.fields) if kind in KINDS else (f"there is no fused step for {kind}",)


def head(request: Any) -> Iterator[str]:
    """request: of the slot `model.head_step`."""
    yield from _rows(request, request.fields.norm.name)


def _rows(request: Any, norm: str) -> Iterator[str]:
    if request.dtype == "fp16":
        yield "computes in fp32 and bf16, not in fp16"
    if norm not in ("rmsnorm", "none"):
        yield f"the norm is `{norm}`, not an RMS norm"
    if request.dims.d_in > WIDEST_NORM:
        yield f"rows of {request.dims.d_in} channels are wider than {WIDEST_NORM}"


def _sublayer(request: Any) -> Iterator[str]:
    yield from _rows(request, request.sub.norm.name)
    if not request.alone:
        yield "the layer is one branch of a sum"
    if request.sub.residual.name != "pre":
        yield f"the residual form is `{request.sub.residual.name}`, not `pre`"
    if request.beside:
        yield "the layer reads or gives something that goes past the stream"
    if request.sub.input != "stream":
        yield f"the layer reads `{request.sub.input}`, not the stream alone"
    if request.branch.adapter.name != "none":
        yield f"the layer has an adapter, `{request.branch.adapter.name}`"


def _mamba2(f: Values) -> Iterator[str]:
    if not _is_power_of_2(f.d_state) or f.d_state > WIDEST_STATE:
        yield f"d_state {f.d_state} is no power of two up to {WIDEST_STATE}"
    if not _is_power_of_2(f.head_dim):
        yield f"head_dim {f.head_dim} is no power of two"
    if not 2 <= f.d_conv <= 4:
        yield f"d_conv {f.d_conv} is not 2, 3 or 4"
    if norm_ranks(f) > 1:
        yield f"{norm_ranks(f)} ranks share a group of its norm"
    elif f.heads * f.head_dim // f.norm_groups > WIDEST_NORM:
        yield f"norm groups of {f.heads * f.head_dim // f.norm_groups} channels are wider than {WIDEST_NORM}"


def _attention(f: Values) -> Iterator[str]:
    if f.head_dim > WIDEST_HEAD:
        yield f"head_dim {f.head_dim} is above {WIDEST_HEAD}"
    if f.qk_norm.name == "full_width":
        yield "qk_norm is over the full width, not per head"
    elif f.qk_norm.name == "per_head" and f.qk_norm.zero_centered:
        yield "the scale of qk_norm is 1 + weight"
    if f.keep and f.window is not None:
        yield "its windows keep no first tokens"
    if f.sinks:
        yield "its softmax has no sinks"
    if f.differential.name != "none":
        yield f"differential is {f.differential.name}"
    if f.out_gate != "none":
        yield f"out_gate is {f.out_gate}"
    if f.rope.name == "rope" and f.rope.scaling.name == "dynamic":
        yield "rope scaling is dynamic: its frequencies depend on the length so far"


def _mlp(f: Values) -> Iterator[str]:
    yield from ()


KINDS: dict[str, Callable[[Values], Iterator[str]]] = {"mamba2": _mamba2, "attention": _attention, "mlp": _mlp}


def _is_power_of_2(n: int) -> bool:
    return n & (n - 1) == 0
