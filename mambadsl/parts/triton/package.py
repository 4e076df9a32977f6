"""Our own Triton kernels, where measurement showed that no package does it or does it well."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.kinds.fields import Field, Int, OrWord
from mambadsl.parts.part import Package, Part, Request
from mambadsl.parts.triton.decode.accepts import step

#: One program holds one group of channels (or one row) in registers.
LARGEST_ROW = 16384


def gate_norm(request: Request) -> Iterator[str]:
    f = request.fields
    width = f.heads * f.head_dim // f.norm_groups
    if width > LARGEST_ROW:
        yield f"norms groups of at most {LARGEST_ROW:,} channels, not {width:,}"


def rms_norm(request: Request) -> Iterator[str]:
    if request.dims.d_model > LARGEST_ROW // 2:
        yield f"norms at most {LARGEST_ROW // 2:,} channels (and twice that with the embedding beside)"


CHUNKS = Field(
    "chunks", OrWord("auto", Int(1, 1024)), None, "how many chunks of tokens the logits are computed in, one at a time"
)

PACKAGE = Package(
    name="triton",
    doc="mambadsl's own kernels, in Triton",
    modules=("triton",),
    install="pip install triton",
    distribution="triton",
    tested="3.6.0",
    source="https://github.com/triton-lang/triton",
    parts=(
        Part(
            "triton.gate_norm", ("mamba2.gate_norm",), "gate and grouped RMS norm in one pass",
            "mambadsl.parts.triton.gate_norm:make_gate_norm", gate_norm,
        ),
        Part(
            "triton.rms_norm", ("model.norm",), "RMS norm in one pass, float32 inside",
            "mambadsl.parts.triton.norm:make_rms_norm", rms_norm,
        ),
        Part(
            "triton.linear_cross_entropy", ("model.loss",),
            "the head's product and the loss in chunks: the logits are never whole",
            "mambadsl.parts.triton.cross_entropy:make_loss", args=(CHUNKS,),
        ),
        Part(
            "triton.step", ("mamba2.step", "attention.step", "mlp.step"),
            "one token of a whole sublayer in a few kernels, its state in place",
            "mambadsl.parts.triton.decode.steps:make_step", step,
        ),
    ),
)
