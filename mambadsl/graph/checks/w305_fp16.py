"""W305: recurrences overflow in fp16."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

W305 = declare(
    "W305",
    "training recurrent layers in fp16",
    """
    A model with Mamba layers is to be trained in fp16.

    Why: states and gates of recurrences leave fp16's range (largest number 65,504); hybrids were reported to
    give NaN losses that bf16 does not have.

    Example: a Falcon-H1 model with the dtype fp16.

    Instead: bf16 with float32 master weights; float32 on machines without bf16.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    if subject.facts.dtype != "fp16" or subject.facts.mode != "train":
        return
    for site in subject.recurrent():
        message = "recurrent layers are trained in fp16, whose range their states can leave"
        help = ("bf16 with float32 master weights",)
        yield Problem(Diagnostic(W305, message, site.span, "the first recurrent layer", help=help))
        return
