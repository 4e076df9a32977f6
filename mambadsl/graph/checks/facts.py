"""What is known of a run beside the model: sizes of batch and mesh, who will run it, in which numbers.

Every fact has a default with which no rule speaks that would not speak about the model alone. A value that
no run can have is a `ValueError`: facts come from a command line or from code, not from a model file.
"""

from __future__ import annotations

from dataclasses import dataclass

from mambadsl.graph.checks.targets import TARGETS, Target

CHOICES = {
    "target": tuple(TARGETS),
    "dtype": ("bf16", "fp16", "fp32"),
    "precision": ("none", "fp8", "mxfp8", "nvfp4"),
    "mode": ("train", "decode"),
    "padding": ("none", "left", "right"),
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """batch: sequences of one microbatch. length: tokens of a sequence (None: the model's context).
    tp, cp, pp: tensor-, context- and pipeline-parallel sizes (pp None: as the text cuts). target: who else
    must be able to run the model. parts: the part set by name; the rules on kernels speak for a set that is
    named. precision: 8- or 4-bit matrix products. padding: where rows of unequal length are padded.
    lora_targets: projections that low-rank adapters are put on from outside. max_sequences: sequences served
    at once; memory_bytes: of one device, for their fixed state. prefill_chunk: tokens of one piece of a
    prompt."""

    batch: int = 1
    length: int | None = None
    tp: int = 1
    cp: int = 1
    pp: int | None = None
    target: str = "none"
    parts: str = "auto"
    dtype: str = "bf16"
    precision: str = "none"
    mode: str = "train"
    padding: str = "none"
    lora_targets: tuple[str, ...] = ()
    max_sequences: int | None = None
    memory_bytes: int | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, legal in CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is one of {', '.join(legal)}, not {getattr(self, name)!r}")
        for name in ("batch", "length", "tp", "cp", "pp", "max_sequences", "memory_bytes", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    @property
    def tool(self) -> Target:
        return TARGETS[self.target]

    @property
    def dtype_bytes(self) -> int:
        return BYTES[self.dtype]
