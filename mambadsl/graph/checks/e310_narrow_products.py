"""E310, E311: sizes of matrix products in 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import listed
from mambadsl.graph.checks.subject import Problem, Site, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

E310 = declare(
    "E310",
    "a matrix product's sizes do not fit FP8",
    """
    With FP8, every matrix that is multiplied in 8 bits has both sizes, on a device, in multiples of 16, and
    batch * length is a multiple of 8.

    Why: the tensor cores' FP8 instructions and Transformer Engine take no others.

    Example: `mamba2(heads=24)` with in_proj's output of 3,352 channels.

    Instead: `heads=32`; or keep that layer in bf16.
    """,
)
E311 = declare(
    "E311",
    "a matrix product's sizes do not fit block-scaled numbers",
    """
    With MXFP8, both sizes of a matrix, on a device, are multiples of 32; with NVFP4, of 16.

    Why: so many neighbours share one scale.

    Example: `mamba2(heads=16)` with MXFP8 and in_proj's output of 2,320 channels.

    Instead: sizes in multiples of the block, or keep that layer in bf16.
    """,
)
MULTIPLE = {"fp8": (E310, 16), "mxfp8": (E311, 32), "nvfp4": (E311, 16)}


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    if facts.precision == "none":
        return
    code, multiple = MULTIPLE[facts.precision]
    tokens = facts.batch * subject.length
    if tokens % 8:
        message = f"batch * length must be a multiple of 8 for {facts.precision}"
        label, span = f"{facts.batch} * {subject.length:,} = {tokens:,} tokens", subject.setting("context")
        yield Problem(Diagnostic(code, message, span if facts.length is None else None, label))
    for site in subject.sites():
        if odd := _odd(site, facts.tp, multiple):
            yield site.problem(
                code, f"sizes of matrix products must be multiples of {multiple} for {facts.precision}",
                label=listed(odd), help=("pad the sizes, or keep this layer in bf16",),
            )


def _odd(site: Site, tp: int, multiple: int) -> list[str]:
    """`name is [out, in]` for every matrix that may be quantised and does not fit, on one device."""
    found = []
    for weight in site.kind.weights(site.f, site.dims):
        if len(weight.shape) < 2 or not weight.quantise:
            continue
        out, in_ = weight.shape[-2:]
        out = out // tp if weight.tp in ("out", "heads") else out
        in_ = in_ // tp if weight.tp == "in" else in_
        if out % multiple or in_ % multiple:
            found.append(f"{weight.name.removesuffix('.weight')} is [{out}, {in_}]")
    return found
