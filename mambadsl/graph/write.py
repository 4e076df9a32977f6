"""LayerGraph -> `.mdl` text: short and idiomatic, only what differs from defaults.

`unroll(resolve(read(write(g)))) == g` for every checked graph, also one edited in Python: repeats are
found anew in the row of layers.
"""

from __future__ import annotations

from mambadsl.graph.cost import costs, total
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.spec.emit import Emitter, adapter_text, settings
from mambadsl.spec.model import MODEL_FIELDS, MTP_FIELDS
from mambadsl.spec.parts import parts_text
from mambadsl.syntax.fold import fold
from mambadsl.syntax.read import read
from mambadsl.syntax.write import write as write_file
from mambadsl.text.source import from_text


def write(graph: LayerGraph) -> str:
    """The canonical text of a model that compiles to this graph."""
    emitter = Emitter(graph.model)
    shared = {n.owner.split(".")[1] for n in graph.nodes if n.owner.startswith("shared.")}
    for name in sorted(shared):
        emitter.reserve(name)
    declared: dict[str, str] = {}
    first = ["|"] if graph.nodes[0].cut_after else []
    stack = fold(first + _names(graph.layers, emitter, declared))
    tail = [n for n in graph.nodes if n.role is Role.LAYER and n.path.startswith("mtp.0.")]
    mtp = fold(_names(tail, emitter, declared)) if graph.mtp else ""
    lines = [f"model {graph.name} {{"]
    lines += [f"  {name} = {value}" for name, value in settings(MODEL_FIELDS, graph.model, full=False)]
    lines += ["}\n", *emitter.lines, *declared.values(), "\nstack {", stack, "}\n"]
    if graph.mtp:
        args = ", ".join(f"{n}={v}" for n, v in settings(MTP_FIELDS, graph.mtp.settings, full=False))
        lines.append(f"mtp({args}) {{ {mtp} }}\n")
    lines += [parts_text(block) + "\n" for block in graph.parts]
    lines.append(f"expect layers == {len(graph.layers)}")
    lines.append(f"expect params == {total(costs(graph)).params}")
    return write_file(read(from_text("\n".join(lines), name=f"write({graph.name})")))


def _names(nodes: tuple[Node, ...] | list[Node], emitter: Emitter, declared: dict[str, str]) -> list[str]:
    """One word for each layer, shared item, and cut, in order."""
    out: list[str] = []
    at = 0
    while at < len(nodes):
        node = nodes[at]
        if node.owner.startswith("shared."):
            at, word = _shared(nodes, at, emitter, declared)
            out.append(word)
        else:
            word = emitter.use(node.layer)
            out.append(word)
            at += 1
        if nodes[at - 1].cut_after:
            out.append("|")
    return out


def _shared(nodes, at: int, emitter: Emitter, declared: dict[str, str]) -> tuple[int, str]:
    """The run of nodes that is one use of a shared item."""
    parts = nodes[at].owner.split(".")
    name, single = parts[1], len(parts) == 2
    run = [nodes[at]]
    while not single and at + len(run) < len(nodes) and nodes[at + len(run)].owner == f"shared.{name}.{len(run)}":
        run.append(nodes[at + len(run)])
    if name not in declared:
        inner = fold([emitter.use(n.layer) for n in run])
        declared[name] = f"shared {name} = " + (inner if single else f"[{inner}]")
        emitter.first_uses[name] = [n.layer for n in run]
    word = name
    if [n.layer for n in run] != emitter.first_uses[name]:
        word = f"{name}({adapter_text(run[0].layer.branches[0].branch.adapter)})"
    return at + len(run), word
