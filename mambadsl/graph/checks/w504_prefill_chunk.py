"""W504: pieces of a prompt are whole chunks of the scan."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import listed, multiples_near
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import declare

W504 = declare(
    "W504",
    "pieces of a prompt are not whole scan chunks",
    """
    With `prefill_chunk`: prompts that are read in pieces should have pieces in multiples of the Mamba-2
    `chunk`.

    Why: a piece that ends inside a chunk makes the last chunk a partial one and the next piece start anew:
    slower, and in some engines an error.

    Example: pieces of 1,000 tokens with `mamba2(chunk=256)`.

    Instead: pieces of 768 or 1,024 tokens.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    piece = subject.facts.prefill_chunk
    if piece is None:
        return
    for site in subject.sites("mamba2"):
        if piece % site.f.chunk:
            near = listed(multiples_near(piece, site.f.chunk), word="or")
            yield site.problem(
                W504, "pieces of a prompt should be multiples of `chunk`", ("chunk",),
                label=f"{piece} tokens are not whole chunks of {site.f.chunk}",
                help=(f"pieces of {near} tokens",),
            )
