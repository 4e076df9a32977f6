"""E601: the target can express every layer."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import listed
from mambadsl.graph.checks.subject import Problem, Site, Subject
from mambadsl.text.diagnostic import Diagnostic, Label, declare

E601 = declare(
    "E601",
    "the target has no such layer",
    """
    For a target: every layer must be of a kind that it has; sums, shared layers, and layers of one kind with
    different fields only where it has them.

    Why: an export would drop or change something, and the model would be another one.

    Example: `M+A` with the target `megatron`, whose pattern has one mixer a layer.

    Instead: the message names what the target has.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    tool = subject.facts.tool
    first: dict[str, Site] = {}
    for site in subject.sites():
        kind = site.mixer.kind
        if tool.kinds and kind not in tool.kinds:
            yield site.problem(
                E601, f"`{subject.facts.target}` has no layer of kind `{kind}`",
                help=(f"there are {listed(tool.kinds)}",),
            )
        elif tool.one_size and (fields := _unlike(site, first.setdefault(kind, site), tool.varied)):
            yield site.problem(
                E601, f"`{subject.facts.target}` has one size for all layers of kind `{kind}`", fields,
                label=f"{listed(f'`{name}`' for name in fields)} not as in other layers",
                labels=(Label(first[kind].span, "other layers are this"),) if first[kind].span else (),
            )
    sums = [node for node in subject.graph.layers if len(node.layer.branches) > 1]
    if sums and not tool.sums:
        place, help = sums[0].layer.span or sums[0].span, ("one after the other: `M A`",)
        message = f"`{subject.facts.target}` has no layers in parallel"
        yield Problem(Diagnostic(E601, message, place, "a sum", help=help), tuple(sums))
    shared = [node for node in subject.graph.layers if node.shared]
    if shared and not tool.shared:
        message, place = f"`{subject.facts.target}` has no shared layers", subject.declaration(shared[0])
        help = ("`layer` instead of `shared` gives every use weights of its own",)
        yield Problem(Diagnostic(E601, message, place, "shared", help=help), tuple(shared))


def _unlike(site: Site, first: Site, varied: tuple[str, ...]) -> tuple[str, ...]:
    """Fields in which two layers of a kind differ, and may not."""
    return tuple(name for name in site.f if site.f[name] != first.f[name] and name not in varied)
