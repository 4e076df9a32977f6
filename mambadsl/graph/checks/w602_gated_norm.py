"""W602: the target computes the gated norm as the model does."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

W602 = declare(
    "W602",
    "the target's gated norm differs",
    """
    For a target: the gated norm of Mamba-2 must gate and normalise in the same order, and over the same
    groups of channels, as the target does.

    Why: weights load without an error and give other numbers.

    Example: `mamba2(gated_norm=before_gate)` with the target `vllm`, which normalises after the gate.

    Instead: `gated_norm=after_gate`, with `norm_groups` equal to `groups`.
    """,
)
#: Targets that normalise over the same groups as B and C have.
SAME_GROUPS = ("megatron", "mamba_ssm", "gguf")


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    for site in subject.sites("mamba2"):
        f = site.f
        if f.gated_norm == "before_gate" and not facts.tool.norm_before_gate:
            yield site.problem(
                W602, f"`{facts.target}` normalises after the gate", ("gated_norm",),
                label="before the gate here", help=("`gated_norm=after_gate`",),
            )
        elif f.gated_norm != "none" and f.norm_groups != f.groups and facts.target in SAME_GROUPS:
            yield site.problem(
                W602, f"`{facts.target}` normalises over as many groups as B and C have",
                ("norm_groups", "groups"), label=f"{f.norm_groups} groups in the norm, {f.groups} of B and C",
                help=(f"`norm_groups={f.groups}`",),
            )
