"""The model for Google's Model Explorer: one graph, a node for each layer, groups as namespaces.

In: a graph, and maybe a plan. Out: JSON text that `model-explorer` opens. Nothing is folded: the viewer does.
A sum is a node for each branch and one that adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mambadsl.graph.cost import Cost, costs
from mambadsl.graph.graph import Edge, LayerGraph, Node
from mambadsl.show.describe import all_fields, kind_text, shape_text
from mambadsl.show.flow import stages_of
from mambadsl.show.fold import group_text

if TYPE_CHECKING:
    from mambadsl.plan.plan import Plan


def explorer_data(graph: LayerGraph, *, plan: Plan | None = None) -> dict[str, Any]:
    """{"label", "graphs": [{"id", "nodes"}]}, nodes as Model Explorer's GraphNode."""
    stages = stages_of(graph, plan=plan)
    table = costs(graph)
    incoming: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        incoming.setdefault(edge.target, []).append(edge)
    nodes = []
    for node in graph.nodes:
        nodes += _nodes(graph, node, incoming.get(node.path, []), table[node.path], stages)
    return {"label": graph.name, "graphs": [{"id": graph.name, "nodes": nodes}]}


def explorer_text(graph: LayerGraph, *, plan: Plan | None = None) -> str:
    import json

    return json.dumps(explorer_data(graph, plan=plan), indent=1) + "\n"


def _nodes(
    graph: LayerGraph, node: Node, edges: list[Edge], cost: Cost, stages: dict[str, int] | None
) -> list[dict[str, Any]]:
    space = namespace(graph, node)
    label = node.layer.label if node.layer is not None else node.path.rpartition(".")[2]
    attrs = {"kind": kind_text(node), "shape": shape_text(graph, node), **dict(all_fields(node)), **_costs(cost)}
    if node.shared:
        attrs["weights of"] = node.owner
    if stages:
        attrs["stage"] = str(stages[node.path])
    sources = [edge.source for edge in edges]
    width = graph.model.d_model
    branches = node.branches()
    if len(branches) < 2:
        return [_node(node.path, label, space, sources, attrs, width, edges)]
    inner = f"{space}/{label}" if space else label
    found = [
        _node(path, mixer.name or mixer.kind, inner, sources, {"kind": mixer.kind}, width, edges)
        for path, _, mixer in branches
    ]
    stream = [edge.source for edge in edges if edge.tensor == "x"]
    return [*found, _node(node.path, "+", inner, [*(path for path, _, _ in branches), *stream], attrs, width, [])]


def namespace(graph: LayerGraph, node: Node) -> str:
    """`stack/[M F][0]/Local[2]`: one level for each block around the node, with its pass."""
    levels = ["mtp", node.path.split(".")[1]] if node.path.startswith("mtp.") else []
    levels = ["stack"] if node.path.startswith("stack.") else levels
    for frame in node.trail:
        called = f"{group_text(frame.label)}[{frame.index}]".replace("/", "|")
        if frame.count > 1 or levels[-1].rpartition("[")[0] != group_text(frame.label):
            levels.append(called)
    return "/".join(levels)


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
