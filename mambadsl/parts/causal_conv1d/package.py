"""causal-conv1d: the short depthwise convolution of recurrent layers (CUDA)."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.kinds.gated_delta_net import kind as gated_delta_net
from mambadsl.kinds.kimi_delta import kind as kimi_delta
from mambadsl.kinds.mamba2.kind import conv_dim, in_segments
from mambadsl.parts.part import Package, Part, Request

#: For each kind: channels of the convolution, and of the projection that they are a slice of.
WIDTHS = {
    "mamba2": lambda f: (conv_dim(f), sum(n for _, n in in_segments(f))),
    "mamba1": lambda f: (f.d_inner, 2 * f.d_inner),
    **{
        kind.KIND.name: lambda f, kind=kind: (kind.conv_dim(f), sum(n for _, n in kind.in_segments(f)))
        for kind in (gated_delta_net, kimi_delta)
    },
}


def conv(request: Request) -> Iterator[str]:
    """E104, E105 and E107 of the checks, as this kernel sees them."""
    f = request.fields
    channels, row = WIDTHS[request.slot.partition(".")[0]](f)
    if not 2 <= f.d_conv <= 4:
        yield f"takes d_conv 2, 3 or 4, not {f.d_conv}"
    if channels % 8:
        yield f"takes channels in multiples of 8, not {channels:,}"
    if row % 8:
        yield f"reads rows whose width is a multiple of 8, not {row:,}"
    if channels >= 2**16 * 64:
        yield f"takes fewer than {2**16 * 64:,} channels, not {channels:,}"


PACKAGE = Package(
    name="causal_conv1d",
    doc="Dao-AILab/causal-conv1d: causal depthwise convolutions of 2 to 4 taps",
    modules=("causal_conv1d",),
    install="pip install --no-build-isolation causal-conv1d",
    distribution="causal-conv1d",
    tested="1.7.0",
    source="https://github.com/Dao-AILab/causal-conv1d",
    parts=(
        Part(
            "causal_conv1d.conv", ("mamba2.conv", "mamba1.conv", "gated_delta_net.conv", "kimi_delta.conv"),
            "the convolution with silu, documents and states included",
            "mambadsl.parts.causal_conv1d.conv:make_conv", conv, needs=("triton",),
        ),
    ),
)
