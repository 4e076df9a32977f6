"""W211: vLLM sizes its cache by what each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.registry import get
from mambadsl.text.diagnostic import Diagnostic, declare

W211 = declare(
    "W211",
    "a pipeline stage without attention, or without a recurrent layer",
    """
    For vLLM: each stage that the text cuts should hold both attention and recurrent layers, if the model has
    both.

    Why: vLLM aligns the pages of recurrent state with those of keys and values, separately in each stage; a
    stage with one sort only gets other page sizes and fails.

    Example: `stack { M M | M A }` with the target `vllm`.

    Instead: move the cut: `stack { M A | M M A }`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    if subject.facts.target != "vllm" or not any(n.cut_after for n in subject.graph.nodes):
        return
    stages, held = [], {"attention": False, "recurrent": False}
    for node in subject.graph.layers:
        for mixer in node.layer.branches:
            held["attention"] |= get(mixer.kind).attends
            held["recurrent"] |= get(mixer.kind).recurrent
        if node.cut_after or node is subject.graph.layers[-1]:
            stages.append((node, held))
            held = dict.fromkeys(held, False)
    if not all(any(held[what] for _, held in stages) for what in held):
        return
    for number, (last, held) in enumerate(stages, 1):
        for what, there in held.items():
            if not there:
                message = f"stage {number} of {len(stages)} has no {what} layer"
                span = last.cut_span or last.span
                yield Problem(Diagnostic(W211, message, span, "it ends here", help=("move the cut",)))
