"""mamba-ssm: the SSD scan, its fusion with convolution and gated norm, Mamba-3 (Triton); the selective scan (CUDA)."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.kinds.fields import Field, Int, OrWord
from mambadsl.kinds.mamba3.kind import angles
from mambadsl.parts.causal_conv1d.package import conv
from mambadsl.parts.part import Package, Part, Request
from mambadsl.parts.triton.package import HOPPER, KEEP, SCANNED, gate_norm, whole_groups

#: tl.arange takes powers of two; the states' kernels hold one whole row of them.
LARGEST_STATE = 256
#: Sides of the blocks that Mamba-3's kernels hold: powers of two, and a whole head's fits into shared memory.
TILES = (16, 32, 64, 128)


def scan(request: Request) -> Iterator[str]:
    head_dim, d_state = SCANNED[request.slot.partition(".")[0]](request.fields)
    if d_state & (d_state - 1) or not 16 <= d_state <= LARGEST_STATE:
        yield f"takes d_state 16, 32, 64, 128 or 256, not {d_state}"
    if head_dim > 256:
        yield f"takes head_dim up to 256, not {head_dim}"


def core(request: Request) -> Iterator[str]:
    yield from scan(request)
    yield from conv(request)
    yield from gate_norm(request)
    yield from whole_groups(request)


def selective(request: Request) -> Iterator[str]:
    if request.fields.d_state > LARGEST_STATE:
        yield f"takes d_state up to {LARGEST_STATE}, not {request.fields.d_state}"


def siso(request: Request) -> Iterator[str]:
    f, pairs = request.fields, angles(request.fields)
    if f.rank > 1:
        yield f"takes one input a head, not rank={f.rank} (mamba-ssm's kernels for several need tilelang)"
    for name in ("head_dim", "d_state"):
        if f[name] not in TILES:
            yield f"takes {name} {', '.join(map(str, TILES[:-1]))} or {TILES[-1]}, not {f[name]}"
    if pairs % 2 or not pairs:
        yield f"turns 2, 4, 6, ... pairs of channels, not {pairs} (d_state * rope_fraction / 2)"


CHUNK = Field(
    "chunk", OrWord("auto", Int(16, 256)), None, "tokens computed together, a power of two; no effect on the result"
)

PACKAGE = Package(
    name="mamba_ssm",
    doc="state-spaces/mamba: the reference kernels of Mamba, Mamba-2 and Mamba-3",
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
            "mambadsl.parts.mamba_ssm.scan:make_core", core, (CHUNK, KEEP), needs=("causal_conv1d", "triton"),
        ),
        Part(
            "mamba_ssm.scan", ("mamba2.scan", "lightning.scan"),
            "the chunked SSD scan, initial and final states included",
            "mambadsl.parts.mamba_ssm.scan:make_scan", scan, (CHUNK,),
        ),
        Part(
            "mamba_ssm.siso", ("mamba3.core",),
            "the scan of one input a head with its biases, turns and gate; one token in decoding: the narrow slots",
            "mambadsl.parts.mamba_ssm.siso:make_siso", siso, capability=HOPPER,
        ),
        Part(
            "mamba_ssm.selective_scan", ("mamba1.scan",), "the selective scan of Mamba-1",
            "mambadsl.parts.mamba_ssm.selective:make_selective_scan", selective,
        ),
    ),
)
