"""LayerGraph <-> canonical JSON, with a content hash. Same graph, same bytes.

Layers that are equal are listed once; floats keep their exact value (shortest round-trip decimals).
"""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from typing import Any

from mambadsl.graph.graph import Edge, LayerGraph, Node, Role
from mambadsl.graph.unroll import connect
from mambadsl.kinds.fields import Call, Word
from mambadsl.kinds.values import Values, Variant
from mambadsl.spec.make import checked, settings
from mambadsl.spec.model import LayerSpec, Mixer, MtpSpec, PartChoice, PartsSpec
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare

VERSION = 1

E062 = declare(
    "E062",
    "a compiled graph that cannot be read",
    """
    The file is not a graph written by `mambadsl compile`, was written by a newer version, or was changed
    afterwards: its content no longer has the hash it carries. Compile the model again.
    """,
)


def to_data(graph: LayerGraph) -> dict[str, Any]:
    """Plain data. `from_data(to_data(g)) == g`."""
    layers: dict[LayerSpec, int] = {}
    nodes = []
    for n in graph.nodes:
        at = layers.setdefault(n.layer, len(layers)) if n.layer else None
        own = {"path": n.path, "role": str(n.role), "layer": at}
        nodes.append({**own, "owner": n.owner, "cut_after": n.cut_after})
    return {
        "version": VERSION,
        "name": graph.name,
        "model": _plain(graph.model),
        "layers": [_layer(spec) for spec in layers],
        "nodes": nodes,
        "edges": [[e.source, e.target, e.tensor, e.width] for e in graph.edges],
        "mtp": _plain(graph.mtp.settings) if graph.mtp else None,
        "parts": [
            {
                "name": p.name, "base": p.base,
                "choices": [[c.path, c.part, [[k, _raw(v)] for k, v in c.args]] for c in p.choices],
            }
            for p in graph.parts
        ],
    }


def content_hash(data: dict[str, Any]) -> str:
    """SHA-256 of the data's canonical bytes."""
    return hashlib.sha256(_bytes(data)).hexdigest()


def dumps(graph: LayerGraph) -> str:
    """The file's text: the graph and its hash."""
    data = to_data(graph)
    return json.dumps({"sha256": content_hash(data), "graph": data}, indent=1, ensure_ascii=False) + "\n"


def loads(text: str, *, name: str = "graph.json") -> LayerGraph:
    """Reads what `dumps` wrote. Raises MdlError if it is something else or was changed."""
    try:
        document = json.loads(text)
        data, expected = document["graph"], document["sha256"]
        version = data["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MdlError([Diagnostic(E062, f"`{name}` is not a compiled graph")]) from None
    if version != VERSION:
        raise MdlError([Diagnostic(E062, f"`{name}` has format {version}; this version reads {VERSION}")])
    if content_hash(data) != expected:
        message = f"`{name}` was changed: its content does not have the hash it carries"
        raise MdlError([Diagnostic(E062, message)])
    try:
        graph = from_data(data)
        body = [node.role for node in graph.nodes if not node.tail]
        if (body[0], body[-1]) != (Role.EMBED, Role.HEAD) or graph.edges != connect(graph.nodes, graph.model):
            raise ValueError("nodes and edges do not fit")
    except MdlError as error:
        notes = tuple(d.message for d in error.diagnostics)
        raise MdlError([Diagnostic(E062, f"`{name}` holds a layer that cannot be", notes=notes)]) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise MdlError([Diagnostic(E062, f"`{name}` is not a compiled graph")]) from None
    return graph


def from_data(data: dict[str, Any]) -> LayerGraph:
    """The graph of plain data. Raises MdlError for values that no field takes; other errors where the data
    is not what `to_data` gave."""
    model = _values(data["model"])
    if settings(model) != model:
        raise ValueError("settings are missing")
    layers = [_layer_from(layer, model) for layer in data["layers"]]
    at = {None: None, **dict(enumerate(layers))}
    nodes = tuple(
        Node(n["path"], Role(n["role"]), at[n["layer"]], n["owner"], n["cut_after"]) for n in data["nodes"]
    )
    mtp = MtpSpec(_values(data["mtp"]), ()) if data["mtp"] is not None else None
    edges = tuple(Edge(*e) for e in data["edges"])
    return LayerGraph(data["name"], model, nodes, edges, mtp, tuple(map(_parts_from, data["parts"])))


def _layer_from(data: dict[str, Any], model: Values) -> LayerSpec:
    mixers = tuple(
        Mixer(b["kind"], _values(b["fields"]), _values(b["branch"]), b["name"]) for b in data["branches"]
    )
    return checked(LayerSpec(mixers, _values(data["sub"]), data["name"]), model=model)


def _parts_from(data: dict[str, Any]) -> PartsSpec:
    choices = [
        PartChoice(path, part, tuple((key, _unraw(value)) for key, value in args))
        for path, part, args in data["choices"]
    ]
    return PartsSpec(data["name"], data["base"], tuple(choices))


def _layer(spec: LayerSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "branches": [
            {"name": m.name, "kind": m.kind, "fields": _plain(m.fields), "branch": _plain(m.branch)}
            for m in spec.branches
        ],
        "sub": _plain(spec.sub),
    }


def _plain(value: Any) -> Any:
    match value:
        case Values():
            return {k: _plain(v) for k, v in value.items()}
        case Variant():
            return {"form": value.name, **({"fields": _plain(value.values)} if value.values else {})}
        case tuple() | list():
            return [_plain(v) for v in value]
    return value


def _values(data: Any) -> Any:
    match data:
        case {"form": name, **rest}:
            return Variant(name, _values(rest.get("fields", {})))
        case dict():
            return Values({k: _values(v) for k, v in data.items()})
        case list():
            return tuple(_values(v) for v in data)
    return data


def _raw(value: Any) -> Any:
    match value:
        case Fraction():
            return {"number": str(value)}
        case Word():
            return {"word": value.text}
        case Call():
            return {"call": value.name, "args": {k: _raw(v) for k, v in value.args.items()}}
        case list() | tuple():
            return [_raw(v) for v in value]
        case str():
            return {"text": value}
    return value


def _unraw(data: Any) -> Any:
    match data:
        case {"number": text}:
            return Fraction(text)
        case {"word": text}:
            return Word(text)
        case {"call": name, "args": args}:
            return Call(name, {k: _unraw(v) for k, v in args.items()})
        case {"text": text}:
            return text
        case list():
            return tuple(_unraw(v) for v in data)
    return data


def _bytes(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
