"""What torch's own kernels cannot do: reasons, none where a part fits the request. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.parts.part import Request

#: For each kind: channels of a head, by the fields that they come from.
HEADS = {
    "attention": lambda f: {"head_dim": f.head_dim},
    "cca": lambda f: {"head_dim": f.head_dim},
    "mla": lambda f: {"nope_dim + rope_dim": f.nope_dim + f.rope_dim, "value_dim": f.value_dim},
}


def attention(request: Request) -> Iterator[str]:
    """Any heads of 16 channels or more, without sinks."""
    for name, channels in HEADS[request.slot.partition(".")[0]](request.fields).items():
        if channels < 16:
            yield f"{name} must be at least 16 for windows, packed documents and softcaps, not {channels}"
    if request.fields.get("sinks"):
        yield "its softmax has no sinks"


def experts(request: Request) -> Iterator[str]:
    """Widths that are multiples of 8 (16 bytes of bf16)."""
    f = request.fields
    widths = dict(input=f.latent or request.dims.d_in, d_ff=f.d_ff)
    for name, width in widths.items():
        if width % 8:
            yield f"{name} must be a multiple of 8, not {width}"
