"""mamba-ssm: the SSD scan and its fusion with convolution and gated norm (Triton), the selective scan (CUDA)."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.kinds.fields import Field, Int, OneOf, OrWord
from mambadsl.parts.causal_conv1d.package import conv
from mambadsl.parts.part import Package, Part, Request

#: tl.arange takes powers of two; the states' kernels hold one whole row of them.
LARGEST_STATE = 256
#: The gated norm holds one group of channels in registers.
LARGEST_GROUP = 16384


def scan(request: Request) -> Iterator[str]:
    f = request.fields
    if f.d_state & (f.d_state - 1) or not 16 <= f.d_state <= LARGEST_STATE:
        yield f"takes d_state 16, 32, 64, 128 or 256, not {f.d_state}"
    if f.head_dim > 256:
        yield f"takes head_dim up to 256, not {f.head_dim}"


def core(request: Request) -> Iterator[str]:
    yield from scan(request)
    yield from conv(request)
    f = request.fields
    width = f.heads * f.head_dim // f.norm_groups
    if f.gated_norm != "none" and width > LARGEST_GROUP:
        yield f"norms groups of at most {LARGEST_GROUP:,} channels, not {width:,}"


def selective(request: Request) -> Iterator[str]:
    if request.fields.d_state > LARGEST_STATE:
        yield f"takes d_state up to {LARGEST_STATE}, not {request.fields.d_state}"


CHUNK = Field(
    "chunk", OrWord("auto", Int(16, 256)), None, "tokens computed together, a power of two; no effect on the result"
)
KEEP = Field(
    "keep", OneOf("states", "all", "none"), "states",
    "what the forward pass keeps for the backward pass: none is smallest, all is fastest",
)

PACKAGE = Package(
    name="mamba_ssm",
    doc="state-spaces/mamba: the reference kernels of Mamba and Mamba-2",
    modules=("mamba_ssm", "triton", "einops"),
    load="mambadsl.parts.mamba_ssm.load:load",
    install="pip install --no-build-isolation mamba-ssm causal-conv1d",
    distribution="mamba-ssm",
    tested="2.3.2",
    source="https://github.com/state-spaces/mamba",
    parts=(
        Part(
            "mamba_ssm.core", ("mamba2.core",),
            "convolution, SSD scan and gated norm as one opaque op; with a state, the narrow slots",
            "mambadsl.parts.mamba_ssm.core:make_core", core, (CHUNK, KEEP), needs=("causal_conv1d", "triton"),
        ),
        Part(
            "mamba_ssm.scan", ("mamba2.scan",), "the chunked SSD scan, initial and final states included",
            "mambadsl.parts.mamba_ssm.scan:make_scan", scan, (CHUNK,),
        ),
        Part(
            "mamba_ssm.selective_scan", ("mamba1.scan",), "the selective scan of Mamba-1",
            "mambadsl.parts.mamba_ssm.selective:make_selective_scan", selective,
        ),
    ),
)
