"""Whether two graphs compute the same: what stands between them, layer by layer.

Where tensors lie, chunks, initial values and cuts do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.kinds.fields import Field
from mambadsl.kinds.registry import get
from mambadsl.kinds.sublayer import BRANCH_FIELDS, SUBLAYER_FIELDS
from mambadsl.kinds.values import Values
from mambadsl.spec.model import MODEL_FIELDS, MTP_FIELDS
from mambadsl.text.diagnostic import Code, Diagnostic, Label, MdlError

#: Differences that are told.
LISTED = 8


def differences(ours: LayerGraph, theirs: LayerGraph) -> Iterator[tuple[str, Node | None]]:
    """What a family computes otherwise: a sentence, and the layer."""
    for name, (a, b) in _unequal(MODEL_FIELDS, ours.model, theirs.model):
        yield f"`{name}` is {a} here, {b} there", None
    if len(ours.layers) != len(theirs.layers):
        yield f"{len(ours.layers)} layers here, {len(theirs.layers)} there", None
    yield from _tails(ours, theirs)
    sharing, others_sharing = _first_uses(ours), _first_uses(theirs)
    for node, other in zip(_laid(ours), _laid(theirs)):
        kinds, others = ([b.kind for b in n.layer.branches] for n in (node, other))
        if kinds != others:
            yield f"{node.path}: {' + '.join(kinds)} here, {' + '.join(others)} there", node
            continue
        if sharing[node.path] != others_sharing[other.path]:
            yield f"{node.path}: weights that other layers use too", node
        tables = [(SUBLAYER_FIELDS, node.layer.sub, other.layer.sub)]
        for mixer, their in zip(node.layer.branches, other.layer.branches):
            tables.append((get(mixer.kind).fields, mixer.fields, their.fields))
            tables.append((BRANCH_FIELDS, mixer.branch, their.branch))
        for fields, a, b in tables:
            for name, (x, y) in _unequal(fields, a, b):
                yield f"{node.path}: `{name}` is {x} here, {y} there", node


def misfit(code: Code, graph: LayerGraph, what: str, problems: Sequence[tuple[str, Node | None]]) -> MdlError:
    """A graph that fits nothing of theirs. what: the nearest of it; problems: as `differences` gives them."""
    notes = [text for text, _ in problems[:LISTED]]
    if len(problems) > LISTED:
        notes.append(f"and {len(problems) - LISTED} more")
    labels = tuple(Label(node.span, "stands in the way") for _, node in problems[:3] if node and node.span)
    return MdlError([Diagnostic(code, f"`{graph.name}` does not fit {what}", labels=labels, notes=tuple(notes))])


def _laid(graph: LayerGraph) -> tuple[Node, ...]:
    """The layers of the stack, and then those of the multi-token prediction."""
    return (*graph.layers, *(n for n in graph.nodes if n.layer and n.path.startswith("mtp.")))


def _first_uses(graph: LayerGraph) -> dict[str, str]:
    """For each layer, the first that has the same weights."""
    first: dict[str, str] = {}
    return {node.path: first.setdefault(node.owner, node.path) for node in _laid(graph)}


def _tails(ours: LayerGraph, theirs: LayerGraph) -> Iterator[tuple[str, None]]:
    a, b = (len(_laid(g)) - len(g.layers) for g in (ours, theirs))
    if a != b:
        yield f"{a} layers of multi-token prediction here, {b} there", None
    elif ours.mtp and theirs.mtp:
        for name, (x, y) in _unequal(MTP_FIELDS, ours.mtp.settings, theirs.mtp.settings):
            yield f"`{name}` of `mtp` is {x} here, {y} there", None


def _unequal(fields: tuple[Field, ...], ours: Values, theirs: Values) -> Iterator[tuple[str, tuple[str, str]]]:
    for f in fields:
        a, b = ours[f.name], theirs[f.name]
        if not f.inert and not _equal(a, b):
            yield f.name, (f.type.text(a, full=False), f.type.text(b, full=False))


def _equal(a: Any, b: Any) -> bool:
    """Numbers up to the last bits: the same multiplier may be written with one digit less."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return a == b
