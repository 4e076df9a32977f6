"""Which part of a model a tensor rank has: the fields of its layers, and the ranges of each of their weights; and rows
of the vocabulary.

In: a graph and a number of ranks. Out: the graph of one rank's part (all are alike), and a `Slice` for every weight of
a layer that is split, and for the tables. Refuses (ValueError) a number that no layer splits into. Layers that do not
split, or hand something to each other past the stream, norms before layers, and a vocabulary that does not divide are
whole on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mambadsl.graph.checks.legal import listed, near
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.weights import node_weights
from mambadsl.kinds.kind import Dims, Weight
from mambadsl.kinds.registry import get
from mambadsl.spec.model import Mixer


@dataclass(frozen=True, slots=True)
class Range:
    """`size` elements from `start` on. copies: so many neighbouring ranks have the same."""

    start: int
    size: int
    copies: int


@dataclass(frozen=True, slots=True)
class Slice:
    """What a rank has of a weight: `ranges` of an axis of the whole, one after another. shape: of the whole."""

    shape: tuple[int, ...]
    axis: int
    ranges: tuple[Range, ...]


def split(graph: LayerGraph, ranks: int) -> LayerGraph:
    """The graph of one rank's part. ValueError if it is the whole."""
    part = _split(graph, ranks)
    if ranks > 1 and part == graph:
        # The vocabulary alone is not worth that every rank computes all layers.
        found = near(ranks, lambda n: n == 1 or _split(graph, n) != graph)
        raise ValueError(f"no layer can be shared by {ranks} tensor ranks: {listed(found, word='or')} would do")
    vocab = graph.model.vocab
    return replace(part, model=graph.model.replace(vocab=vocab if vocab % ranks else vocab // ranks))


def _split(graph: LayerGraph, ranks: int) -> LayerGraph:
    def mixer(whole: Mixer, dims: Dims) -> Mixer:
        kind = get(whole.kind)
        # What layers hand each other would have to be cut alike in all of them.
        apart = ranks > 1 and not (kind.gives(whole.fields, dims) or kind.takes(whole.fields, dims))
        fields = kind.split(whole.fields, ranks) if apart else None
        return whole if fields is None else replace(whole, fields=fields)

    def node(whole: Node) -> Node:
        if whole.role is not Role.LAYER:
            return whole
        dims = whole.dims(graph.model.d_model)
        return replace(whole, layer=replace(whole.layer, branches=tuple(mixer(m, dims) for m in whole.layer.branches)))

    return replace(graph, nodes=tuple(map(node, graph.nodes)))


def whole(graph: LayerGraph, ranks: int) -> list[str]:
    """The layers, or branches, that every rank computes whole, those of one name together: `A (attention, 4 times)`;
    and the vocabulary, if it is."""
    if ranks == 1:
        return []
    part, times = _split(graph, ranks), Counter()
    for node, mine in zip(graph.nodes, part.nodes):
        for (path, _, mixer), (_, _, other) in zip(node.branches(), mine.branches()):
            if mixer == other:
                times[mixer.name or path, mixer.kind] += 1
    found = [f"{name} ({kind}{f', {count} times' * (count > 1)})" for (name, kind), count in times.items()]
    vocab = graph.model.vocab
    return found + [f"the vocabulary ({vocab:,} ids are no multiple of {ranks})"] * (vocab % ranks > 0)


def told(graph: LayerGraph, ranks: int) -> list[str]:
    """What a run says of it."""
    if ranks == 1:
        return []
    alone, vocab = whole(graph, ranks), graph.model.vocab
    shared = (
        f"{vocab // ranks:,} of {vocab:,} ids on each tensor rank, and the loss over these parts, whatever fills "
        "`model.loss`"
    )
    return [shared] * (vocab % ranks == 0) + [f"whole on every tensor rank: {', '.join(alone)}"] * bool(alone)


def slices(graph: LayerGraph, part: LayerGraph, *, ranks: int, rank: int) -> dict[str, Slice | None]:
    """Path -> what the rank has of the weight, of every weight whose gradient comes from a part of a layer or of the
    vocabulary; None where it has nothing. The bias of a layer's exit is the first rank's."""
    found: dict[str, Slice | None] = {}
    for node, mine in zip(graph.nodes, part.nodes):
        weights, local = dict(node_weights(graph, node)), dict(node_weights(part, mine))
        if node.role is not Role.LAYER:
            cut = (path for path, weight in weights.items() if weight.shape != local[path].shape)
            found.update((path, _slice(weights[path], local[path], ranks=ranks, rank=rank)) for path in cut)
        for prefix in _split_prefixes(node, mine):
            for path, weight in weights.items():
                if not path.startswith(f"{prefix}."):
                    continue
                entry = weights.get(f"{path.removesuffix('.bias')}.weight")
                if path.endswith(".bias") and entry is not None and entry.tp == "in":
                    found[path] = alone(weight) if rank == 0 else None
                else:
                    found[path] = _slice(weight, local[path], ranks=ranks, rank=rank)
    return found


def _split_prefixes(node: Node, mine: Node) -> Iterator[str]:
    """Where the weights of split branches are, and of their adapters."""
    for (_, prefix, mixer), (_, _, part) in zip(node.branches(), mine.branches()):
        if mixer != part:
            yield from dict.fromkeys((prefix, node.path + prefix.removeprefix(node.owner)))


def shared(graph: LayerGraph, part: LayerGraph) -> dict[str, bool]:
    """The split branches, by path -> whether one has a projection inside whose channels the ranks share, before the one
    at its exit."""
    found = {}
    for node, mine in zip(graph.nodes, part.nodes):
        for (path, _, mixer), (_, _, other) in zip(node.branches(), mine.branches()):
            if mixer != other:
                table = get(mixer.kind).weights(mixer.fields, node.dims(graph.model.d_model))
                found[path] = any(w.tp == "in" and not w.init.residual for w in table)
    return found


def alone(weight: Weight) -> Slice:
    """All of it, on this rank alone."""
    return Slice(weight.shape, 0, (Range(0, weight.shape[0], 1),))


def same(weight: Weight, ranks: int) -> Slice:
    """All of it, on every rank."""
    return Slice(weight.shape, 0, (Range(0, weight.shape[0], ranks),))


def _slice(weight: Weight, local: Weight, *, ranks: int, rank: int) -> Slice:
    axis = next((axis for axis, (n, m) in enumerate(zip(weight.shape, local.shape)) if n != m), None)
    if axis is None:
        return same(weight, ranks)
    sizes = [(weight.shape[axis], local.shape[axis])]
    # Of fewer segments than the whole's, the first ranks have the first ones (heads of Mamba-1's x_proj).
    if len(weight.cuts) == len(local.cuts) > 0 and axis == max(0, len(weight.shape) - 2):
        sizes = list(zip(weight.cuts, local.cuts))
    ranges, start = [], 0
    for n, m in sizes:
        ranges.append(Range(start + rank * n // ranks // m * m, m, ranks * m // n))
        start += n
    return Slice(weight.shape, axis, tuple(ranges))
