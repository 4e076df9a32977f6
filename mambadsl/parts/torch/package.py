"""torch's own kernels: attention and the experts' grouped products."""

from __future__ import annotations

from mambadsl.kinds.fields import Field, OneOf
from mambadsl.parts.part import Package, Part
from mambadsl.parts.torch.accepts import attention, experts

BACKEND = Field(
    "backend", OneOf("auto", "cudnn", "flash", "efficient"), "auto", "what plain causal attention prefers"
)

PACKAGE = Package(
    name="torch",
    doc="PyTorch's own kernels",
    modules=("torch",),
    install="pip install torch",
    distribution="torch",
    tested="2.11 to 2.13",
    source="https://pytorch.org",
    parts=(
        Part(
            "torch.attention", ("attention.core", "mla.core", "cca.core"),
            "scaled_dot_product_attention; FlexAttention for documents, windows and softcaps",
            "mambadsl.parts.torch.attention:make_attention", attention, (BACKEND,), devices=("cuda", "cpu"),
        ),
        Part(
            "torch.grouped_mm", ("moe.experts",), "the routed experts as grouped matrix products, no wait for the host",
            "mambadsl.parts.torch.experts:make_experts", experts, dtypes=("bf16",), capability=(9, 0),
        ),
    ),
)
