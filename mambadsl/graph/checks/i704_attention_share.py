"""I704: hybrids have few attention layers, spread over the depth."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.kinds.registry import get
from mambadsl.text.diagnostic import Diagnostic, declare

I704 = declare(
    "I704",
    "an unusual share or place of attention layers",
    """
    Among the attention and recurrent layers of a hybrid, more than a quarter (rounded up) are attention; or
    three and more attention layers all stand in one half of the depth. Sums, windows, short convolutions, and
    attention that takes the keys of another layer do not count.

    Why: released hybrids have 7 to 13 % (Nemotron-H, Jamba, Bamba, Granite 4) or a quarter (Qwen3-Next, OLMo
    Hybrid, Kimi Linear), evenly spread: every full attention layer costs cache for each token. It is a habit,
    not a law.

    Example: `[M A]*12`: half of the mixers are attention.

    Instead: `[M M M M A]*5`, say.
    """,
)


def check(subject: Subject) -> Iterator[Problem]:
    # "a" full attention, "r" recurrent, in order.
    mixers = []
    for node in subject.graph.layers:
        if len(node.layer.branches) == 1 and not node.shared:
            mixer = node.layer.branches[0]
            kind = get(mixer.kind)
            if kind.recurrent and not kind.local:
                mixers.append((False, node))
            elif kind.attends and mixer.fields.get("window") is None and mixer.fields.get("takes") != "kv":
                mixers.append((True, node))
    places = [i for i, (attention, _) in enumerate(mixers) if attention]
    if not places or len(places) == len(mixers):
        return
    span, half = mixers[places[0]][1].span, len(mixers) / 2
    if len(places) > -(-len(mixers) // 4):
        message = f"{len(places)} of {len(mixers)} mixers are attention, {len(places) / len(mixers):.0%}"
        note = "released hybrids have 7 to 25 %"
        yield Problem(Diagnostic(I704, message, span, "the first of them", notes=(note,)))
    elif len(places) > 2 and (places[-1] < half or places[0] >= half):
        message = f"all {len(places)} attention layers are in one half of the depth"
        note = "released hybrids spread them"
        yield Problem(Diagnostic(I704, message, span, "the first of them", notes=(note,)))
