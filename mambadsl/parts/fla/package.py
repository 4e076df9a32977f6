"""flash-linear-attention: a Triton convolution, for machines where nothing can be compiled with nvcc."""

from __future__ import annotations

from mambadsl.parts.fla.accepts import conv
from mambadsl.parts.part import Package, Part

PACKAGE = Package(
    name="fla",
    doc="fla-org/flash-linear-attention: Triton kernels of linear attention",
    modules=("fla", "triton"),
    install="pip install flash-linear-attention",
    distribution="flash-linear-attention",
    tested="0.6.0",
    source="https://github.com/fla-org/flash-linear-attention",
    parts=(
        Part(
            "fla.conv", ("mamba2.conv", "mamba1.conv", "gated_delta_net.conv", "kimi_delta.conv"),
            "the convolution with silu in Triton; packed documents and states by the pure-torch one",
            "mambadsl.parts.fla.conv:make_conv", conv,
        ),
    ),
)
