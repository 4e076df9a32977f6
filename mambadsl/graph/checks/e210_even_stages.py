"""E210: tools that count layers need equally many in each pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import divisors_near, listed
from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.text.diagnostic import Diagnostic, declare

E210 = declare(
    "E210",
    "the layers do not divide among pipeline stages",
    """
    For targets that give every stage equally many layers (Megatron): without cuts in the text, `pp` must
    divide the number of layers. This compiler's own planner needs no such thing: it balances by cost.

    Why: Megatron stops at start-up, or takes an explicit layout, which cuts in the text become.

    Example: 30 layers with pp=4 and the target `megatron`.

    Instead: cut marks, for instance after 7, 15 and 23 layers: `[M F]*3 M | F [M F]*3 M | ...`.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    facts, layers = subject.facts, len(subject.graph.layers)
    cut = any(node.cut_after for node in subject.graph.nodes)
    if not facts.tool.cuts_evenly or cut or facts.pp is None or layers % facts.pp == 0:
        return
    places = [layers * i // facts.pp for i in range(1, facts.pp)]
    after = f"put `|` after {listed(places)} layers" if places and places[0] else "fewer stages than layers"
    fitting = [n for n in divisors_near(layers, facts.pp, most=4) if n > 1]
    even = (f"pp={listed(fitting, word='or')} divides {layers}",) if fitting else ()
    message = f"{layers} layers cannot be split evenly into {facts.pp} pipeline stages"
    first = subject.graph.layers[0].span
    yield Problem(Diagnostic(E210, message, first, "from here on", help=(after, *even)))
