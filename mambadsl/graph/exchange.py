"""LayerGraph <-> networkx.DiGraph. The DiGraph may be edited; taken back, it is checked again.

Node keys are paths. Node attributes: `role`, `layer` (a LayerSpec; or give `kind=` and `fields=` for a
new one), `owner`, `cut_after`. Edge attribute: `tensors`, a dict of tensor name -> width. Graph
attributes: `name`, `model`, `mtp`, `parts`. Order and paths are derived anew from the "x" edges, so a
layer is inserted by adding a node under any new key and reconnecting. A layer that reads the first embedding
(`input=with_embedding`) has an "x0" edge from `embed`; what follows a layer with `residual=aside` has a "t" edge from
it. Weights are a node's own unless its owner is
`shared.NAME` (or `shared.NAME.0`, `shared.NAME.1`, ...: all layers of one use, in order).
"""

from __future__ import annotations

from typing import Any

from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.unroll import connect, unroll
from mambadsl.graph.write import write
from mambadsl.kinds.values import Values
from mambadsl.spec.make import checked, layer, settings
from mambadsl.spec.model import LayerSpec, ModelSpec, is_name, name_of
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import from_text

E060 = declare(
    "E060",
    "a graph that is not a model",
    """
    A model's graph has one `embed` node, one `head` node, and layers on a single path of "x" edges from
    the one to the other (the residual stream). Tensors carried past it start at `embed` and end at layers with
    `input=with_embedding` (`x0`), or lead from a layer with `residual=aside` to the next one (`t`). All uses of a
    shared item have the same layers in the same order. The message names the nodes that do not fit.
    """,
)
_MTP = (Role.MTP_IN, Role.MTP_OUT)


def to_networkx(graph: LayerGraph) -> Any:
    """The same graph as a networkx.DiGraph, in running order."""
    import networkx as nx

    out = nx.DiGraph(name=graph.name, model=graph.model, mtp=graph.mtp, parts=graph.parts)
    for n in graph.nodes:
        kind = "+".join(b.kind for b in n.layer.branches) if n.layer else str(n.role)
        out.add_node(
            n.path, role=str(n.role), kind=kind, layer=n.layer, owner=n.owner, cut_after=n.cut_after,
            span=n.span,
        )
    for e in graph.edges:
        if out.has_edge(e.source, e.target):
            out.edges[e.source, e.target]["tensors"][e.tensor] = e.width
        else:
            out.add_edge(e.source, e.target, tensors={e.tensor: e.width})
    return out


def layers_from_networkx(g: Any) -> LayerGraph:
    """The frozen graph of an edited DiGraph: neither checked yet, nor held to a text (`spec_of`). Raises
    MdlError where it is no model."""
    import networkx as nx

    if not isinstance(g, nx.DiGraph) or g.is_multigraph():
        raise _refuse(f"a networkx.DiGraph is needed, not {type(g).__name__}")
    if not isinstance(g.graph.get("model"), Values):
        raise _refuse("the graph has no `model` attribute: start from `program.graph` or `mambadsl.Graph`")
    if not nx.is_directed_acyclic_graph(g):
        loop = " -> ".join(str(a) for a, _ in nx.find_cycle(g))
        raise _refuse(f"the nodes run in a circle: {loop}")
    model = settings(g.graph["model"])
    roles = {key: _role(key, data) for key, data in g.nodes(data=True)}
    tail = [key for key, role in roles.items() if role in _MTP or str(key).startswith("mtp.")]
    chain = _chain(g, roles, set(tail))
    nodes, renamed = [], {}
    for i, key in enumerate(chain):
        path = str(key) if i in (0, len(chain) - 1) else f"stack.{i - 1}"
        renamed[key] = path
        nodes.append(_node(path, key, g.nodes[key], roles[key], model))
    ends = [_node(str(key), key, g.nodes[key], roles[key], model) for key in tail]
    ordered = (*nodes, *ends)
    name = g.graph.get("name") or "a_model"
    if not (isinstance(name, str) and is_name(name)):
        raise _refuse(f"`{name}` is no name for a model", help=f"for instance `{name_of(str(name))}`")
    graph = LayerGraph(
        name, model, ordered, connect(ordered, model), g.graph.get("mtp"), tuple(g.graph.get("parts") or ())
    )
    _same_edges(g, graph, renamed)
    return graph


def spec_of(graph: LayerGraph) -> ModelSpec:
    """The spec of the graph's text. What no text says is no model (E060): half a use of a shared item, depths
    of `mtp` that differ."""
    try:
        spec = resolve(read(from_text(write(graph), name=f"{graph.name}.mdl")))
        again = unroll(spec)
    except MdlError as error:
        notes = tuple(d.message for d in error.diagnostics[:3])
        raise MdlError([Diagnostic(E060, "the graph has no text", notes=notes)]) from None
    if again != graph:
        pairs = zip((*again.nodes, None), (*graph.nodes, None))
        node = next((theirs or ours for ours, theirs in pairs if ours != theirs), None)
        what = f"`{node.path}` (weights of `{node.owner}`)" if node else "the whole"
        raise _refuse(f"the graph has no text that says the same; {what} does not fit its neighbours")
    return spec


def _role(key: Any, data: dict) -> Role:
    role = data.get("role", "layer")
    if role not in tuple(Role):
        raise _refuse(f"the node `{key}` has no role of a model: `{role}`", help="roles: " + ", ".join(Role))
    if (key == "embed") != (role == Role.EMBED) or (key == "head") != (role == Role.HEAD):
        raise _refuse(f"the node `{key}` cannot be `{role}`: `embed` and `head` are one node each, so named")
    return Role(role)


def _chain(g: Any, roles: dict[Any, Role], tail: set) -> list[Any]:
    """Keys from embed to head along the residual stream; every layer must be on it."""
    if "embed" not in roles or "head" not in roles:
        raise _refuse("the nodes `embed` and `head` must be there")
    chain, at = ["embed"], "embed"
    while at != "head":
        edges = g.out_edges(at, data=True)
        after = [v for _, v, data in edges if "x" in _tensors(at, v, data) and v not in tail]
        if len(after) != 1:
            follow = ", ".join(f"`{k}`" for k in after) or "nothing"
            raise _refuse(f"after `{at}` the residual stream must lead to one node; here follows {follow}")
        at = after[0]
        chain.append(at)
    left = [k for k in g if k not in set(chain) and k not in tail]
    if left:
        raise _refuse("not on the way from `embed` to `head`: " + ", ".join(f"`{k}`" for k in left[:5]))
    return chain


def _tensors(source: Any, target: Any, data: dict) -> Any:
    tensors = data.get("tensors", {"x": 0})
    if not isinstance(tensors, (dict, list, tuple, set)):
        raise _refuse(f"`tensors` of the edge from `{source}` to `{target}` is a dict of names and widths")
    return tensors


def _node(path: str, key: Any, data: dict, role: Role, model: Values) -> Node:
    owner = data.get("owner")
    kept = isinstance(owner, str) and (owner.startswith("shared.") or path.startswith("mtp."))
    spec = _layer(key, data, model) if role is Role.LAYER else None
    return Node(path, role, spec, owner if kept else path, bool(data.get("cut_after")), data.get("span"))


def _layer(key: Any, data: dict, model: Values) -> LayerSpec:
    if data.get("layer") is None and "kind" not in data:
        raise _refuse(f"the node `{key}` has neither `layer` nor `kind`")
    try:
        if data.get("layer") is None:
            return layer(data["kind"], model=model, **data.get("fields", {}))
        if not isinstance(data["layer"], LayerSpec):
            raise _refuse(f"`layer` of the node `{key}` is no LayerSpec", help="see `mambadsl.make_layer`")
        return checked(data["layer"], model=model)
    except TypeError as error:
        raise _refuse(f"the node `{key}` is no layer: {error}") from None


def _same_edges(g: Any, graph: LayerGraph, renamed: dict) -> None:
    """The edges are the tensors that layers read, no more and no less."""
    said = {
        (renamed.get(u, u), renamed.get(v, v), t)
        for u, v, data in g.edges(data=True) for t in _tensors(u, v, data)
    }
    reads = {(e.source, e.target, e.tensor) for e in graph.edges}
    if extra := sorted(said - reads, key=str):
        u, v, t = extra[0]
        raise _refuse(f"nothing in `{v}` reads the tensor `{t}` of `{u}`")
    if missing := sorted(reads - said):
        u, v, t = missing[0]
        help = f'add it, `g.add_edge("{u}", ..., tensors={{"{t}": width}})`, or let the layer not read it'
        raise _refuse(f"`{v}` reads the tensor `{t}` of `{u}`, and there is no such edge", help=help)


def _refuse(message: str, *, help: str = "") -> MdlError:
    return MdlError([Diagnostic(E060, message, help=(help,) if help else ())])
