"""The named part sets, and what each is for."""

from __future__ import annotations

SETS: dict[str, str] = {
    "reference": "any machine; pure torch; the truth",
    "fused": "training on GPUs: mamba-ssm, causal-conv1d, fused attention and loss",
    "te": "Transformer Engine linears, norms and attention; mamba-ssm for the recurrences",
    "inference": "decoding: static caches, step kernels, one CUDA graph a step",
    "auto": "for this machine, the fastest that each slot accepts",
}
