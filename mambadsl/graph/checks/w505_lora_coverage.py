"""E505, W505: low-rank adapters reach the layers of a hybrid."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.subject import Problem, Subject
from mambadsl.graph.graph import Node
from mambadsl.kinds.registry import get
from mambadsl.kinds.sublayer import adapter_weights
from mambadsl.text.diagnostic import Diagnostic, declare
from mambadsl.text.source import Span
from mambadsl.text.spell import nearest

E505 = declare(
    "E505",
    "a target of low-rank adapters is in no layer",
    """
    With `lora_targets`: every name must be a projection of some layer.

    Why: adapters with a wrong name are not created, and nothing is trained there.

    Example: `lora_targets` with `q_proj`, where the projection is `qkv_proj`.

    Instead: the names of this model's projections, which the message lists.
    """,
)
W505 = declare(
    "W505",
    "low-rank adapters reach few layers",
    """
    Adapters (of the text, or by `lora_targets`) are in fewer than half of the layers. Shared layers with an
    adapter at each use do not count: there it is part of the architecture.

    Why: recipes for transformers name attention's projections; a hybrid has a handful of attention layers, so
    most of the model stays as it was.

    Example: q, k, v and o of the 4 attention layers among 56: 7.1 % of the layers.

    Instead: name the projections of all kinds: `in_proj`, `out_proj`, `up_proj`, `down_proj` too.
    """,
)

#: Projections of other libraries that are part of a wider one here.
_ELSEWHERE = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
}


def check(subject: Subject) -> Iterator[Problem]:
    targets, layers, d_model = subject.facts.lora_targets, subject.graph.layers, subject.graph.model.d_model
    distinct = {id(node.layer): node for node in layers}
    names = {key: _projections(node, d_model) for key, node in distinct.items()}
    adapted = {key for key, node in distinct.items() if _adapted(node, d_model)}
    known = dict.fromkeys(name for found in names.values() for name in sorted(found))
    for target in targets:
        if target not in known:
            near = _ELSEWHERE.get(target) if _ELSEWHERE.get(target) in known else nearest(target, known)
            help = (f"did you mean `{near}`?",) if near else ()
            message = f"no layer has a projection `{target}`"
            yield Problem(Diagnostic(E505, message, help=(*help, f"there are {', '.join(known)}")))
    named = {key for key, found in names.items() if not found.isdisjoint(targets)}
    covered = sum(id(n.layer) in named or (id(n.layer) in adapted and not n.shared) for n in layers)
    if 0 < covered < len(layers) / 2:
        message = f"adapters reach {covered} of {len(layers)} layers, {covered / len(layers):.1%}"
        help = (f"projections of this model: {', '.join(known)}",)
        yield Problem(Diagnostic(W505, message, _place(subject), help=help))


def _projections(node: Node, d_model: int) -> set[str]:
    found = set()
    for _, _, mixer in node.branches():
        for weight in get(mixer.kind).weights(mixer.fields, node.dims(d_model)):
            name = weight.name.removesuffix(".weight").rpartition(".")[2]
            if name.endswith("_proj"):
                found.add(name)
    return found


def _adapted(node: Node, d_model: int) -> bool:
    dims = node.dims(d_model)
    return any(
        adapter_weights(mixer.branch, get(mixer.kind).weights(mixer.fields, dims))
        for _, _, mixer in node.branches()
    )


def _place(subject: Subject) -> Span | None:
    """Where the text asks for an adapter, if it does."""
    return next((site.given("adapter") for site in subject.sites() if site.given("adapter")), None)
