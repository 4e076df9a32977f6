"""LayerGraph <-> networkx.DiGraph. The DiGraph may be edited; taken back, it is checked again.

Node keys are paths. Node attributes: `role`, `layer` (a LayerSpec; or give `kind=` and `fields=` for a
new one), `owner`, `cut_after`. Edge attribute: `tensors`, a dict of tensor name -> width. Graph
attributes: `name`, `model`, `mtp`, `parts`. Order and paths are derived anew from the "x" edges, so a
layer is inserted by adding a node under any new key and reconnecting.
"""

from __future__ import annotations

from typing import Any

from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.unroll import connect
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare

E060 = declare(
    "E060",
    "a graph that is not a model",
    """
    A model's graph has one `embed` node, one `head` node, and layers on a single path of "x" edges from
    the one to the other (the residual stream). Tensors carried past it (`x0`) start at `embed` and end at
    layers with `input=with_embedding`. The message names the nodes that do not fit.
    """,
)


def to_networkx(graph: LayerGraph) -> Any:
    """The same graph as a networkx.DiGraph, in running order."""
    import networkx as nx

    out = nx.DiGraph(name=graph.name, model=graph.model, mtp=graph.mtp, parts=graph.parts)
    for n in graph.nodes:
        kind = "+".join(b.kind for b in n.layer.branches) if n.layer else str(n.role)
        out.add_node(
            n.path, role=str(n.role), kind=kind, layer=n.layer, owner=n.owner, cut_after=n.cut_after, span=n.span
        )
    for e in graph.edges:
        if out.has_edge(e.source, e.target):
            out.edges[e.source, e.target]["tensors"][e.tensor] = e.width
        else:
            out.add_edge(e.source, e.target, tensors={e.tensor: e.width})
    return out


def layers_from_networkx(g: Any) -> LayerGraph:
    """The frozen graph of an edited DiGraph, not checked yet. Raises MdlError where it is no model."""
    import networkx as nx

    model = g.graph.get("model")
    if model is None:
        raise _refuse("the graph has no `model` attribute: start from `program.graph` or `mambadsl.Graph`")
    if not nx.is_directed_acyclic_graph(g):
        loop = " -> ".join(str(a) for a, _ in nx.find_cycle(g))
        raise _refuse(f"the nodes run in a circle: {loop}")
    chain = _chain(g)
    nodes, renamed = [], {}
    for i, key in enumerate(chain):
        data = g.nodes[key]
        role = Role(data.get("role", "layer"))
        path = str(role) if role in (Role.EMBED, Role.HEAD) else f"stack.{i - 1}"
        renamed[key] = path
        owner = data.get("owner") or key
        spec = _layer(key, data, model) if role is Role.LAYER else None
        own = owner == key or not str(owner).startswith("shared.")
        nodes.append(Node(
            path, role, spec, path if own else owner, bool(data.get("cut_after")), data.get("span"),
        ))
    tail = [_tail_node(key, g.nodes[key]) for key in g if str(key).startswith("mtp.")]
    ordered = (*nodes[:-1], *tail, nodes[-1])
    graph = LayerGraph(
        g.graph.get("name") or "model", model, ordered, connect(ordered, model), g.graph.get("mtp"),
        tuple(g.graph.get("parts") or ()),
    )
    _same_edges(g, graph, renamed)
    return graph


def from_networkx(g: Any) -> Any:
    """A checked Program from a (possibly edited) DiGraph."""
    from mambadsl.compile import program_from_graph

    return program_from_graph(layers_from_networkx(g))


def _chain(g: Any) -> list[Any]:
    """Keys from embed to head along the residual stream; every layer must be on it."""
    def x_edges(edges):
        return [other for other, data in edges if "x" in data.get("tensors", {"x": 0})]

    if "embed" not in g or "head" not in g:
        raise _refuse("the nodes `embed` and `head` must be there")
    chain, at = ["embed"], "embed"
    while at != "head":
        after = [k for k in x_edges((v, d) for _, v, d in g.out_edges(at, data=True)) if not str(k).startswith("mtp.")]
        if len(after) != 1:
            follow = ", ".join(f"`{k}`" for k in after) or "nothing"
            raise _refuse(f"after `{at}` the residual stream must lead to one node; here follows {follow}")
        at = after[0]
        if len([1 for _ in g.in_edges(at)]) == 0:
            raise _refuse(f"`{at}` reads nothing")
        chain.append(at)
    left = [k for k in g if k not in set(chain) and not str(k).startswith("mtp.")]
    if left:
        raise _refuse("not on the way from `embed` to `head`: " + ", ".join(f"`{k}`" for k in left[:5]))
    return chain


def _layer(key: Any, data: dict, model: Any) -> Any:
    from mambadsl.spec.make import layer

    if data.get("layer") is not None:
        return data["layer"]
    if "kind" not in data:
        raise _refuse(f"the node `{key}` has neither `layer` nor `kind`")
    return layer(data["kind"], model=model, **data.get("fields", {}))


def _tail_node(key: str, data: dict) -> Node:
    return Node(key, Role(data["role"]), data.get("layer"), data["owner"], span=data.get("span"))


def _same_edges(g: Any, graph: LayerGraph, renamed: dict) -> None:
    """What the edited graph says of tensors carried past the stream must be what the layers read."""
    said = {
        (renamed.get(u, u), renamed.get(v, v), t)
        for u, v, data in g.edges(data=True) for t in data.get("tensors", {"x": 0})
    }
    reads = {(e.source, e.target, e.tensor) for e in graph.edges}
    extra = sorted(said - reads)
    if extra:
        u, v, t = extra[0]
        raise _refuse(f"nothing in `{v}` reads the tensor `{t}` of `{u}`")


def _refuse(message: str) -> MdlError:
    return MdlError([Diagnostic(E060, message)])
