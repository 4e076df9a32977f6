"""ModelSpec -> LayerGraph: groups, repeats and blocks laid out; identities, owners and edges given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mambadsl.graph.graph import Edge, Frame, LayerGraph, Node, Role, streams
from mambadsl.kinds.kind import Carried
from mambadsl.kinds.values import Values
from mambadsl.spec.codes import E029, E047, E049, MAX_LAYERS, short_count
from mambadsl.spec.model import Block, Cut, Element, ModelSpec, Use, count_layers
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.source import Span


def unroll(spec: ModelSpec) -> LayerGraph:
    """Lays the stack out. Raises MdlError for a missing stack, too many layers, misplaced cuts."""
    if problems := _bounds(spec):
        raise MdlError(problems)
    walk = _Walk("stack")
    walk.elements(spec.stack, ())
    if walk.problems:
        raise MdlError(walk.problems)
    embed = Node("embed", Role.EMBED, None, "embed", walk.leading is not None, cut_span=walk.leading)
    nodes = [embed, *walk.nodes, Node("head", Role.HEAD, None, "head"), *_mtp(spec)]
    return LayerGraph(
        spec.name, spec.settings, tuple(nodes), connect(nodes, spec.settings), spec.mtp, spec.parts,
        spec.expects, spec.file,
    )


def _bounds(spec: ModelSpec) -> list[Diagnostic]:
    if not spec.stack:
        message = f"`{spec.name}` has no stack, so there is no model to build"
        return [Diagnostic(E029, message, help=("write `stack { ... }`, or only layers: `M M M A`",))]
    found = []
    layers = count_layers(spec.stack)
    if layers == 0:
        found.append(Diagnostic(E029, "the stack has no layers", spec.stack[0].span, "only cuts"))
    if layers > MAX_LAYERS:
        message = f"the stack has {short_count(layers)} layers; a model has at most {MAX_LAYERS:,}"
        found.append(Diagnostic(E047, message, _largest(spec.stack)))
    tail = spec.mtp.settings.depths * count_layers(spec.mtp.items) if spec.mtp else 0
    if tail > MAX_LAYERS:
        message = f"the `mtp` tail has {tail:,} layers; a model has at most {MAX_LAYERS:,}"
        found.append(Diagnostic(E047, message, spec.mtp.span))
    return found


def connect(nodes: list[Node] | tuple[Node, ...], model: Values) -> tuple[Edge, ...]:
    """The tensors between nodes that stand in this order. Each depth of `mtp` is a chain of its own: it takes nothing
    that layers of the stack give."""
    d = model.d_model
    wide = {path: d * n.read for path, n in streams(nodes).items()}
    edges: list[Edge] = []
    last, beside = "embed", None
    givers: dict[str, str] = {}
    # A repeated layer is one LayerSpec: what it gives and takes is asked once.
    tables: dict[int, tuple[tuple[Carried, ...], tuple[Carried, ...]]] = {}

    def read(node: Node) -> None:
        nonlocal last, beside
        if id(node.layer) not in tables:
            tables[id(node.layer)] = tuple(node.takes(d).values()), tuple(node.gives(d).values())
        takes, gives = tables[id(node.layer)]
        edges.append(Edge(last, node.path, "x", wide[node.path]))
        if node.layer.sub.input == "with_embedding":
            edges.append(Edge("embed", node.path, "x0", d))
        if beside:
            edges.append(Edge(beside, node.path, "t", d))
        edges.extend(Edge(givers[c.name], node.path, c.name, c.width) for c in takes if c.name in givers)
        givers.update((c.name, node.path) for c in gives)
        last, beside = node.path, node.path if node.aside else None

    for node in nodes:
        if node.path.startswith("stack."):
            read(node)
    edges.append(Edge(last, "head", "x", wide["head"]))
    hidden = "head"
    for node in nodes:
        match node.role:
            case Role.MTP_IN:
                edges.append(Edge(hidden, node.path, "h", d))
                edges.append(Edge("embed", node.path, "next", d))
                last, beside = node.path, None
                givers.clear()
            case Role.MTP_OUT:
                edges.append(Edge(last, node.path, "x", wide[node.path]))
                hidden = node.path
            case Role.LAYER if node.tail:
                read(node)
    return tuple(edges)


@dataclass
class _Walk:
    """Numbers layers from 0 below `prefix`. leading: a cut before the first layer."""

    prefix: str
    owner_prefix: str | None = None
    nodes: list[Node] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)
    leading: Span | None = None
    _before: Span | None = None

    def elements(
        self, elements: tuple[Element, ...], trail: tuple[Frame, ...], shared: Iterator[str] | None = None
    ) -> None:
        for element in elements:
            match element:
                case Use():
                    self._add(element, trail, shared)
                case Cut():
                    self._cut(element)
                case Block():
                    self._block(element, trail, shared)

    def _add(self, use: Use, trail: tuple[Frame, ...], shared: Iterator[str] | None) -> None:
        at = len(self.nodes)
        path = f"{self.prefix}.{at}"
        owner = next(shared) if shared else f"{self.owner_prefix or self.prefix}.{at}"
        self.nodes.append(Node(path, Role.LAYER, use.layer, owner, False, use.span, trail=trail))
        self._before = None

    def _cut(self, cut: Cut) -> None:
        if self._before is not None:
            message = "two cuts in a row leave a stage without layers"
            self.problems.append(Diagnostic(E049, message, cut.span, help=("leave one `|` out",)))
        elif not self.nodes:
            self.leading = cut.span
        else:
            self.nodes[-1] = replace(self.nodes[-1], cut_after=True, cut_span=cut.span)
        self._before = cut.span

    def _block(self, block: Block, trail: tuple[Frame, ...], shared: Iterator[str] | None) -> None:
        only = block.items[0] if len(block.items) == 1 else None
        label = block.name or (only.name if isinstance(only, Block) else None)
        label = label or " ".join(_label(item) for item in block.items)
        for i in range(block.count):
            if self.problems:
                return
            inner = trail
            if block.count > 1 or block.name:
                inner = (*trail, Frame(label, i, block.count, block.span, block.chain))
            self.elements(block.items, inner, _owners(block) if block.shared else shared)


def _owners(block: Block) -> Iterator[str]:
    name = f"shared.{block.shared}"
    if count_layers(block.items) == 1:
        yield name
    for i in range(count_layers(block.items)):
        yield f"{name}.{i}"


def _mtp(spec: ModelSpec) -> list[Node]:
    nodes: list[Node] = []
    for depth in range(spec.mtp.settings.depths if spec.mtp else 0):
        owner = "mtp.0" if spec.mtp.settings.weights == "shared" else None
        walk = _Walk(f"mtp.{depth}", owner)
        walk.elements(spec.mtp.items, ())
        base = owner or f"mtp.{depth}"
        nodes.append(Node(f"mtp.{depth}.in", Role.MTP_IN, None, f"{base}.in", span=spec.mtp.span))
        nodes += walk.nodes
        nodes.append(Node(f"mtp.{depth}.out", Role.MTP_OUT, None, f"{base}.out", span=spec.mtp.span))
    return nodes


def _largest(elements: tuple[Element, ...]) -> Span | None:
    """The place of the element that brings the most layers."""
    return max(elements, key=lambda e: count_layers((e,))).span


def _label(element: Element) -> str:
    match element:
        case Use():
            return element.layer.label
        case Cut():
            return "|"
        case Block():
            if element.name:
                inner = element.name
            else:
                inner = " ".join(_label(i) for i in element.items)
                inner = f"[{inner}]" if len(element.items) > 1 else inner
            return f"{inner}*{element.count}" if element.count > 1 else inner
    raise TypeError
