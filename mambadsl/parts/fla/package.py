"""flash-linear-attention: scans in Triton, and a convolution of any number of taps."""

from __future__ import annotations

from mambadsl.parts.fla.accepts import conv, delta_rule
from mambadsl.parts.part import Package, Part

PACKAGE = Package(
    name="fla",
    doc="fla-org/flash-linear-attention: Triton kernels of linear attention",
    modules=("fla", "triton"),
    install="pip install fla-core",
    distribution="fla-core",
    tested="0.6.0",
    source="https://github.com/fla-org/flash-linear-attention",
    parts=(
        Part(
            "fla.gated_delta_rule", ("gated_delta_net.scan",),
            "the gated delta rule in chunks of 64 tokens, one token after the other in decoding",
            "mambadsl.parts.fla.delta_rule:make_gated_delta_rule", delta_rule,
        ),
        Part(
            "fla.kimi_delta_rule", ("kimi_delta.scan",),
            "the delta rule with a decay per channel in chunks of 64 tokens, one token after the other in decoding",
            "mambadsl.parts.fla.delta_rule:make_kimi_delta_rule", delta_rule,
        ),
        Part(
            "fla.decaying_sums", ("rg_lru.scan",),
            "the decaying sums of Griffin's unit, runs of 128 tokens side by side",
            "mambadsl.parts.fla.decaying_sums:make_decaying_sums",
        ),
        Part(
            "fla.weighted_means", ("wkv4.scan",),
            "the weighted means of RWKV-4, token by token; packed documents and padding by the pure-torch ones",
            "mambadsl.parts.fla.weighted_means:make_weighted_means",
        ),
        Part(
            "fla.conv", ("mamba2.conv", "mamba1.conv", "gated_delta_net.conv", "kimi_delta.conv"),
            "the convolution with silu in Triton; packed documents and states by the pure-torch one",
            "mambadsl.parts.fla.conv:make_conv", conv,
        ),
    ),
)
