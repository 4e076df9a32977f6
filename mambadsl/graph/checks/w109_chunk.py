"""W109: chunks of the SSD kernels are powers of two."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import settings
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

W109 = declare(
    "W109",
    "`chunk` is not a power of two",
    """
    For kernels: `chunk`, the number of tokens that the Mamba-2 scan computes together, should be a power of
    two from 16 on.

    Why: the Triton kernels work on blocks of such sizes; NaN was reported for chunks of 40 and 50.

    Example: `mamba2(chunk=50)`.

    Instead: `chunk=64`; 128 and 256 are usual. The result does not depend on it.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    for site in subject.sites("mamba2"):
        chunk = site.f.chunk
        if chunk < 16 or chunk & (chunk - 1):
            below = 1 << (chunk.bit_length() - 1)
            near = sorted({max(16, below), max(16, 2 * below)})
            yield site.problem(
                W109, "`chunk` should be a power of two of at least 16", ("chunk",),
                label=f"the kernels give NaN for some chunks like {chunk}", help=(settings("chunk", near),),
            )
