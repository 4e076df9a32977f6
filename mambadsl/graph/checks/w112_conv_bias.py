"""W112: Megatron has no Mamba convolution without a bias."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

W112 = declare(
    "W112",
    "a convolution without a bias",
    """
    For targets that always have one (Megatron): `conv_bias` should be true.

    Why: Megatron's Mamba layer asserts that the convolution has a bias. A bias of zeros is the same function.

    Example: `mamba2(conv_bias=false)` with the target `megatron`.

    Instead: `conv_bias=true`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    if subject.facts.tool.conv_without_bias:
        return
    for site in subject.sites("mamba1", "mamba2"):
        if not site.f.conv_bias:
            yield site.problem(
                W112, f"`{subject.facts.target}` needs a bias in the convolution", ("conv_bias",),
                label="no bias here", help=("`conv_bias=true`; a bias of zeros is the same function",),
            )
