"""E214: not every tool can use one shared layer in several pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

E214 = declare(
    "E214",
    "a shared layer in several pipeline stages",
    """
    For targets that cannot copy weights between stages (vLLM): a `shared` layer must not be used in a
    pipeline. This compiler itself keeps a copy in each stage and adds up the gradients.

    Why: the weights would have to be on several devices and stay equal.

    Example: `shared S = attention()` used 6 times, with pp=2 and the target `vllm`.

    Instead: tensor parallelism, or one stage.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    if subject.stages == 1 or subject.facts.tool.shared_across_stages:
        return
    uses: dict[str, list] = {}
    for node in subject.graph.layers:
        if node.shared:
            uses.setdefault(node.owner, []).append(node)
    for owner, nodes in uses.items():
        if len(nodes) > 1:
            name = owner.split(".")[1]
            message = f"`{name}` is shared, and `{subject.facts.target}` cannot use it in several stages"
            place, help = subject.declaration(nodes[0]), ("tensor parallelism, or one stage",)
            label = f"with {subject.stages} stages"
            yield Problem(Diagnostic(E214, message, place, label, help=help), tuple(nodes))
