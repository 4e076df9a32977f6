"""The named part sets: for each slot, which parts may fill it, best first.

A slot that a set does not name keeps the pure-torch function of its kind (plain matrix products need no better).
To let a set use a new part, add its name here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mambadsl.parts.part import REFERENCE
from mambadsl.parts.te.package import ENTRIES, EXITS

Order = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class PartSet:
    """order: slot -> parts, best first. lenient: the kind's own function is the last choice for every slot, so
    nothing is ever refused."""

    name: str
    doc: str
    order: Order = field(default_factory=dict, hash=False)
    lenient: bool = False


_CONV = ("triton.conv", "causal_conv1d.conv", "fla.conv")
_FUSED: Order = {
    "mamba2.core": ("triton.core", "mamba_ssm.core"),
    "mamba2.conv": _CONV,
    "mamba2.scan": ("triton.scan", "mamba_ssm.scan"),
    "mamba2.gate_norm": ("triton.gate_norm",),
    "mamba1.conv": _CONV,
    "short_conv.conv": ("triton.plain_conv",),
    "rg_lru.conv": ("triton.plain_conv",),
    "cca.conv": ("triton.plain_conv",),
    "gated_delta_net.conv": _CONV,
    "kimi_delta.conv": _CONV,
    "gated_delta_net.scan": ("fla.gated_delta_rule", REFERENCE),
    "kimi_delta.scan": ("fla.kimi_delta_rule", REFERENCE),
    "mamba3.core": ("mamba_ssm.siso", REFERENCE),
    "rg_lru.scan": ("fla.decaying_sums", REFERENCE),
    "wkv4.scan": ("fla.weighted_means", REFERENCE),
    "gated_delta_net.gate_norm": ("triton.gate_norm",),
    "lightning.scan": ("triton.scan", "mamba_ssm.scan"),
    "kimi_delta.gate_norm": ("triton.gate_norm",),
    "mamba1.scan": ("mamba_ssm.selective_scan",),
    "attention.core": ("torch.attention",),
    "mla.core": ("torch.attention",),
    "cca.core": ("torch.attention",),
    "moe.experts": ("torch.grouped_mm", REFERENCE),
    "model.norm": ("triton.rms_norm",),
    "model.loss": ("triton.linear_cross_entropy",),
}
_TE: Order = {
    **_FUSED,
    **dict.fromkeys(ENTRIES, ("te.norm_linear", "te.linear")),
    **dict.fromkeys(EXITS, ("te.linear",)),
    "attention.core": ("te.attention", "torch.attention"),
    "model.norm": ("te.rms_norm", "triton.rms_norm"),
}
_STEP = ("triton.step",)
_STEPS: Order = {
    **_FUSED,
    "mamba2.step": _STEP,
    "attention.step": _STEP,
    "mlp.step": _STEP,
    "model.embed_step": ("triton.embed",),
    "model.head_step": ("triton.head",),
    "model.next_token": ("triton.next_token",),
}

SETS: dict[str, PartSet] = {
    s.name: s
    for s in (
        PartSet("reference", "any machine; pure torch; the truth"),
        PartSet("fused", "training on GPUs: our kernels and torch's; mamba-ssm's and fla's where we have none", _FUSED),
        PartSet("te", "Transformer Engine linears, norms and attention; the rest as `fused`", _TE),
        PartSet("inference", "decoding: static caches, step kernels, one CUDA graph a step", _STEPS),
        PartSet("auto", "for this machine, the fastest that each slot accepts", _STEPS, lenient=True),
    )
}
