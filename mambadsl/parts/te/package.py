"""Transformer Engine: linears with the norm before them, attention, norms; FP8 where asked for."""

from __future__ import annotations

from mambadsl.kinds.fields import Field, Flag, OneOf
from mambadsl.parts.part import Package, Part
from mambadsl.parts.te.accepts import attention, linear, norm_linear, rms_norm

FP8 = Field("fp8", Flag(), False, "the product in FP8")
RECIPE = Field("recipe", OneOf("current", "block"), "current", "how FP8 tensors are scaled")

MIXERS = (
    "mamba2", "mamba1", "short_conv", "gated_delta_net", "kimi_delta", "rg_lru", "lightning", "mamba3", "mlstm", "gmu",
)
ENTRIES = (
    *(f"{kind}.in_proj" for kind in MIXERS), "attention.qkv_proj", "cca.qkv_proj", "mla.in_proj", "mlp.up_proj",
    "linear.out_proj",
)
EXITS = (*(f"{kind}.out_proj" for kind in MIXERS), "attention.o_proj", "cca.o_proj", "mla.o_proj", "mlp.down_proj")

PACKAGE = Package(
    name="te",
    doc="NVIDIA Transformer Engine",
    modules=("transformer_engine",),
    load="mambadsl.parts.te.load:load",
    install="pip install --no-build-isolation 'transformer-engine[pytorch]'",
    distribution="transformer-engine",
    tested="2.20.2",
    source="https://github.com/NVIDIA/TransformerEngine",
    parts=(
        Part(
            "te.norm_linear", ENTRIES, "LayerNormLinear: the sublayer's norm and the projection after it",
            "mambadsl.parts.te.linear:make_norm_linear", norm_linear, (FP8, RECIPE), takes_norm=True,
            dtypes=("bf16", "fp16", "fp32"),
        ),
        Part(
            "te.linear", ENTRIES + EXITS, "Linear", "mambadsl.parts.te.linear:make_linear", linear, (FP8, RECIPE),
        ),
        Part(
            "te.attention", ("attention.core",), "DotProductAttention", "mambadsl.parts.te.attention:make_attention",
            attention, dtypes=("bf16", "fp16"), needs=("torch",),
        ),
        Part(
            "te.rms_norm", ("model.norm",), "RMSNorm", "mambadsl.parts.te.norm:make_rms_norm", rms_norm,
        ),
    ),
)
