"""E205, W205: key/value heads under tensor parallelism: split, or copied where that is possible."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divide
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

E205 = declare(
    "E205",
    "key/value heads do not divide among devices",
    """
    Tensor parallelism over `tp` devices needs tp to divide `kv_heads`. Some tools (vLLM) also copy key/value
    heads when tp is a multiple of them (W205).

    Why: a device needs the keys and values of all its query heads; Transformer Engine and Megatron refuse
    to split what is too few.

    Example: `attention(heads=32, kv_heads=2)` with tp=8.

    Instead: `kv_heads=8`, or tp=2.
    """,
)
W205 = declare(
    "W205",
    "key/value heads are copied to several devices",
    """
    For targets that copy: there are fewer key/value heads than devices, so several devices hold the same
    keys and values.

    Why: the cache takes tp / kv_heads times the memory that the model alone would need.

    Example: `attention(heads=32, kv_heads=2)` with tp=8 and the target `vllm`: every head 4 times.

    Instead: tp=2, or more key/value heads, if the memory matters.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    for site in subject.sites("attention", "cca"):
        kv_heads = site.f.kv_heads
        if kv_heads % facts.tp == 0:
            continue
        if facts.tool.copies_kv and facts.tp % kv_heads == 0:
            yield site.problem(
                W205, f"{kv_heads} key/value heads are copied to {facts.tp} devices", ("kv_heads",),
                label=f"every head is kept {facts.tp // kv_heads} times",
                help=(f"tp: {divide(kv_heads, facts.tp)}",),
            )
        else:
            yield site.problem(
                E205, "`kv_heads` must be a multiple of the tensor-parallel size", ("kv_heads",),
                label=f"{kv_heads} cannot be split over {facts.tp} devices",
                help=(f"tp: {divide(kv_heads, facts.tp)}",),
            )
