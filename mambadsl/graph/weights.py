"""Every weight of a model by its path: the one table that counts, checkpoints and modules share.

Paths are global and stage-free: `embed.weight`, `embed_norm.weight`, `meta.weight`, `stack.3.norm.weight`,
`stack.3.mixer.in_proj.weight`, `stack.4.1.qkv_proj.weight` (second branch of a sum),
`shared.S.mixer.qkv_proj.weight`, `stack.7.mixer.adapter.o_proj.up.weight` (per-use), `final_norm.weight`,
`head.weight`, `mtp.0.eh_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.kinds.kind import Weight, linear, norm_weights
from mambadsl.kinds.registry import get
from mambadsl.kinds.streams import final_norm, narrow_weights
from mambadsl.kinds.sublayer import adapter_weights, sublayer_weights


def node_weights(graph: LayerGraph, node: Node) -> Iterator[tuple[str, Weight]]:
    """(path, weight) of everything the node reads, shared or its own; tied heads read `embed.weight`."""
    model = graph.model
    d = model.d_model
    match node.role:
        case Role.EMBED:
            yield "embed.weight", _table("embed.weight", model)
            yield from _prefixed("", norm_weights("embed_norm", model.embedding_norm, d))
            if model.meta_tokens:
                yield "meta.weight", Weight("meta.weight", (model.meta_tokens, d), quantise=False)
        case Role.HEAD:
            yield from _prefixed("", _end(graph, node))
            yield ("embed.weight" if graph.tied else "head.weight"), _table("head.weight", model)
        case Role.MTP_IN:
            for name in ("enorm", "hnorm"):
                yield from _prefixed(node.depth_owner, norm_weights(name, model.norm, d))
            yield from _prefixed(node.depth_owner, linear("eh_proj", d, 2 * d))
        case Role.MTP_OUT:
            yield from _prefixed(node.depth_owner, _end(graph, node))
        case Role.LAYER:
            yield from _prefixed(node.owner, sublayer_weights(node.layer.sub, d, graph.most_streams[node.owner]))
            dims = node.dims(d)
            uses = node.branches()
            for i, (_, prefix, mixer) in enumerate(uses):
                table = get(mixer.kind).weights(mixer.fields, dims)
                yield from _prefixed(prefix, table)
                own = f"{node.path}.mixer" if len(uses) == 1 else f"{node.path}.{i}"
                yield from _prefixed(own, adapter_weights(mixer.branch, table))


def all_weights(graph: LayerGraph) -> dict[str, Weight]:
    """Every weight once, in the order of first use."""
    found: dict[str, Weight] = {}
    for node in graph.nodes:
        for path, weight in node_weights(graph, node):
            found.setdefault(path, weight)
    return found


def _prefixed(prefix: str, weights: tuple[Weight, ...]) -> Iterator[tuple[str, Weight]]:
    for w in weights:
        yield (f"{prefix}.{w.name}" if prefix else w.name), w


def _end(graph: LayerGraph, node: Node) -> tuple[Weight, ...]:
    """Of what makes the head's input of the stream, or of several."""
    model, n = graph.model, graph.streams[node.path].read
    return (*narrow_weights(model, n), *norm_weights("final_norm", final_norm(model, n), model.d_model))


def _table(name: str, model) -> Weight:
    return Weight(name, (model.vocab, model.d_model), quantise=False, tp="out")
