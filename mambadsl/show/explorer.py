"""The model for Google's Model Explorer: one graph, a node for each layer, groups as namespaces.

In: a graph, and maybe a plan. Out: JSON text that `model-explorer` opens. Nothing is folded: the viewer does.
A sum is a node for each branch and one that adds.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mambadsl.graph.cost import Cost, costs
from mambadsl.graph.graph import Edge, LayerGraph, Node
from mambadsl.show.describe import all_fields, kind_text, shape_text
from mambadsl.show.flow import stages_of
from mambadsl.show.fold import frames_of, group_text, passes

if TYPE_CHECKING:
    from mambadsl.plan.plan import Plan


def explorer_data(graph: LayerGraph, *, plan: Plan | None = None) -> dict[str, Any]:
    """{"label", "graphs": [{"id", "nodes"}]}, nodes as Model Explorer's GraphNode."""
    stages = stages_of(graph, plan=plan)
    table = costs(graph)
    places = namespaces(graph)
    incoming: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        incoming.setdefault(edge.target, []).append(edge)
    nodes = []
    for node in graph.nodes:
        nodes += _nodes(graph, node, incoming.get(node.path, []), table[node.path], places[node.path], stages)
    return {"label": graph.name, "graphs": [{"id": graph.name, "nodes": nodes}]}


def explorer_text(graph: LayerGraph, *, plan: Plan | None = None) -> str:
    import json

    return json.dumps(explorer_data(graph, plan=plan), indent=1) + "\n"


def _nodes(
    graph: LayerGraph,
    node: Node,
    edges: list[Edge],
    cost: Cost,
    place: tuple[str, str],
    stages: dict[str, int] | None,
) -> list[dict[str, Any]]:
    space, label = place
    attrs = {"kind": kind_text(node), "shape": shape_text(graph, node), **dict(all_fields(node)), **_costs(cost)}
    if node.shared:
        attrs["weights of"] = node.owner
    if stages:
        attrs["stage"] = str(stages[node.path])
    sources = [edge.source for edge in edges]
    width = graph.model.d_model
    stream_width = graph.streams[node.path].given * width
    branches = node.branches()
    if len(branches) < 2:
        return [_node(node.path, label, space, sources, attrs, stream_width, edges)]
    level = f"{label}[{node.path.rpartition('.')[2]}]"
    inner = f"{space}/{level}" if space else level
    found = [
        _node(path, mixer.name or mixer.kind, inner, sources, {"kind": mixer.kind}, width, edges)
        for path, _, mixer in branches
    ]
    stream = [edge.source for edge in edges if edge.tensor == "x"]
    sources = [*(path for path, _, _ in branches), *stream]
    return [*found, _node(node.path, "+", inner, sources, attrs, stream_width, [])]


def namespaces(graph: LayerGraph) -> dict[str, tuple[str, str]]:
    """(namespace, label) of each node by path. A level is a block with its number among those of its name there:
    `stack/[M F][0]/Local[2]`. A block of one layer is no level: it gives the layer its name."""
    found: dict[str, tuple[str, str]] = {}

    def name(nodes: tuple[Node, ...], depth: int, space: str, around: str) -> None:
        used: Counter[str] = Counter()
        for start, end, frame in passes([frames_of(graph, node) for node in nodes], depth):
            inside = nodes[start:end]
            if frame is None or len(inside) == 1:
                label = frame.label if frame is not None else _label(inside[0])
                found[inside[0].path] = space, label
            elif frame.label == around and len(inside) == len(nodes):
                name(inside, depth + 1, space, around)
            else:
                level = f"{group_text(frame.label)}[{used[frame.label]}]".replace("/", "|")
                used[frame.label] += 1
                name(inside, depth + 1, f"{space}/{level}" if space else level, frame.label)

    name(graph.layers, 0, "stack", "")
    name(tuple(node for node in graph.nodes if not node.path.startswith("stack.")), 0, "", "")
    return found


def _label(node: Node) -> str:
    return node.layer.label if node.layer is not None else node.path.rpartition(".")[2]


def _node(
    id: str, label: str, space: str, sources: list[str], attrs: dict[str, str], width: int, edges: list[Edge]
) -> dict[str, Any]:
    return {
        "id": id,
        "label": label,
        "namespace": space,
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, source in enumerate(sources)
        ],
        "attrs": [{"key": key, "value": value} for key, value in attrs.items() if value],
        "inputsMetadata": [
            {"id": str(i), "attrs": [{"key": "__tensor_tag", "value": edge.tensor}]} for i, edge in enumerate(edges)
        ],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": f"batch x length x {width}"}]}],
    }


def _costs(cost: Cost) -> dict[str, str]:
    return {
        "params": str(cost.params),
        "active_params": str(cost.active_params),
        "flops_per_token": str(float(cost.flops.forward)),
        "kv_bytes_per_token": str(cost.kv_bytes_per_token),
        "state_bytes": str(cost.state_bytes),
    }
