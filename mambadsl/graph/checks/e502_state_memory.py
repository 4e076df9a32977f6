"""E502: the state of all sequences fits into the memory for it."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

E502 = declare(
    "E502",
    "the state of so many sequences does not fit",
    """
    With `max_sequences` and `memory_bytes`: the fixed decoding state of that many sequences, on one device,
    must fit into that memory. Keys and values that grow with the length come on top.

    Why: recurrent state is allocated for every slot at start-up, and serving fails there.

    Example: 256 sequences of Nemotron-H 8B (about 100 MB of state each) in 20 GB.

    Instead: the number of sequences that the message names, or tensor parallelism.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts = subject.facts
    if facts.max_sequences is None or facts.memory_bytes is None:
        return
    each = subject.total.state_bytes // facts.tp
    needed = each * facts.max_sequences
    if needed > facts.memory_bytes:
        message = (
            f"{facts.max_sequences:,} sequences need {_size(needed)} of state, more than the "
            f"{_size(facts.memory_bytes)} there are"
        )
        notes = (f"{_size(each)} for one sequence on one device",)
        most = facts.memory_bytes // each
        help = (f"at most {most:,} sequence{'s' * (most != 1)}" if most else "there is no room for one sequence",)
        first = next(subject.recurrent(), None)
        yield Problem(Diagnostic(E502, message, first.span if first else None, notes=notes, help=help))


def _size(n: int) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.2f} MiB"
