"""LayerGraph -> `.mdl` text: short and idiomatic, only what differs from defaults.

`unroll(resolve(read(write(g)))) == g` for every checked graph, also one edited in Python: repeats are
found anew in the row of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mambadsl.graph.cost import costs, total
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.spec.emit import Emitter, adapter_text, declared_use, own_adapter, settings
from mambadsl.spec.model import MODEL_FIELDS, MTP_FIELDS, LayerSpec
from mambadsl.spec.parts import parts_text
from mambadsl.syntax.fold import fold
from mambadsl.syntax.read import read
from mambadsl.syntax.write import write as write_file
from mambadsl.text.source import from_text


def write(graph: LayerGraph) -> str:
    """The canonical text of a model that compiles to this graph."""
    return write_file(read(from_text(_Writer(graph).text(), name=f"write({graph.name})")))


class _Writer:
    def __init__(self, graph: LayerGraph):
        self.graph = graph
        self.emitter = Emitter(graph.model)
        self.tail = [n for n in graph.nodes if n.role is Role.LAYER and n.path.startswith("mtp.0.")]
        #: Shared items by name: the layers of each use.
        self.uses: dict[str, list[list[LayerSpec]]] = {}
        for name, run in (*_runs(graph.layers), *_runs(self.tail)):
            if name:
                self.emitter.reserve(name)
                self.uses.setdefault(name, []).append([n.layer for n in run])
        self.declared: dict[str, list[LayerSpec]] = {}
        for node in graph.nodes:
            if node.layer:
                self.emitter.prefer(node.layer)

    def text(self) -> str:
        graph = self.graph
        first = ["|"] if graph.nodes[0].cut_after else []
        stack = fold(first + self._words(graph.layers))
        tail = fold(self._words(self.tail))
        lines = [f"model {graph.name} {{"]
        lines += [f"  {name} = {value}" for name, value in settings(MODEL_FIELDS, graph.model, full=False)]
        lines += ["}\n", *self.emitter.lines, "\nstack {", stack, "}\n"]
        if graph.mtp:
            args = ", ".join(f"{n}={v}" for n, v in settings(MTP_FIELDS, graph.mtp.settings, full=False))
            lines.append(f"mtp({args}) {{ {tail} }}\n")
        lines += [parts_text(block) + "\n" for block in graph.parts]
        lines.append(f"expect layers == {len(graph.layers)}")
        lines.append(f"expect params == {total(costs(graph)).params}")
        return "\n".join(lines)

    def _words(self, nodes: Sequence[Node]) -> list[str]:
        """One word for each layer, each use of a shared item, and each cut, in order."""
        out: list[str] = []
        for name, run in _runs(nodes):
            out.append(self._shared(name, run) if name else self.emitter.use(run[0].layer))
            if run[-1].cut_after:
                out.append("|")
        return out

    def _shared(self, name: str, run: list[Node]) -> str:
        if name not in self.declared:
            layers = self.declared[name] = declared_use(self.uses[name])
            if run[0].owner == f"shared.{name}":
                inner = self.emitter.inline(layers[0], name)
            else:
                inner = f"[{fold([self.emitter.use(layer) for layer in layers])}]"
            self.emitter.declare(f"shared {name} = {inner}")
        layers = [node.layer for node in run]
        adapter = own_adapter(layers)
        same = adapter is None or layers == self.declared[name]
        return name if same else f"{name}({adapter_text(adapter)})"


def _runs(nodes: Sequence[Node]) -> Iterator[tuple[str | None, list[Node]]]:
    """(None, one node), or (name of a shared item, the nodes of one use)."""
    at = 0
    while at < len(nodes):
        _, _, shared = nodes[at].owner.partition("shared.")
        name, _, number = shared.partition(".")
        run = [nodes[at]]
        while number and at + len(run) < len(nodes):
            node = nodes[at + len(run)]
            if node.owner != f"shared.{name}.{len(run)}":
                break
            run.append(node)
        yield name or None, run
        at += len(run)
