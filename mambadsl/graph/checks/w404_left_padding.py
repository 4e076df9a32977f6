"""W404: padding on the left runs through recurrent state where nobody masks it."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

W404 = declare(
    "W404",
    "left padding in front of recurrent layers",
    """
    For targets that do not mask padding in Mamba layers (mamba_ssm, Megatron): rows are padded on the left.

    Why: padding before a sequence goes through convolution and scan like text and changes the state that the
    first token sees. This compiler's own layers mask it.

    Example: a batch padded on the left, with the target `mamba_ssm`.

    Instead: pad on the right, or pack documents into rows.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    if subject.facts.padding != "left" or subject.facts.tool.masks_padding:
        return
    for site in subject.recurrent():
        message = f"`{subject.facts.target}` lets padding on the left into recurrent state"
        help = ("pad on the right, or pack documents",)
        yield Problem(Diagnostic(W404, message, site.span, "the first recurrent layer", help=help))
        return
