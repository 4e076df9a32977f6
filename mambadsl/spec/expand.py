"""ModelSpec -> text with every default written out: a valid file that compiles to the same graph.

Imports, constants and expressions are gone: each field is there with its value. `origin=True` adds to
each where it came from, as comments.
"""

from __future__ import annotations

from dataclasses import replace

from mambadsl.spec import exact
from mambadsl.spec.emit import Emitter, adapter_text, declared_use, own_adapter, settings
from mambadsl.spec.model import (
    FACTS,
    MODEL_FIELDS,
    MTP_FIELDS,
    Block,
    Cut,
    Element,
    ExpectSpec,
    LayerSpec,
    ModelSpec,
    Origin,
    Use,
)
from mambadsl.spec.parts import parts_text
from mambadsl.syntax import tree
from mambadsl.syntax.fold import single
from mambadsl.syntax.read import read
from mambadsl.syntax.write import write
from mambadsl.text.source import from_text


def expand(spec: ModelSpec, *, origin: bool = False) -> str:
    """The canonical text."""
    return _Expander(spec, origin).text()


class _Expander:
    def __init__(self, spec: ModelSpec, origin: bool):
        self.spec = spec
        self.note = _note if origin else (lambda origin: None)
        self.emitter = Emitter(spec.settings, full=True, note=self.note)
        #: Shared items by name: their uses; and the layers of those that were declared.
        self.uses: dict[str, list[Block]] = {}
        self.declared: dict[str, list[LayerSpec]] = {}
        self.blocks: dict[tuple, str] = {}

    def text(self) -> str:
        spec = self.spec
        elements = (*spec.stack, *(spec.mtp.items if spec.mtp else ()))
        self._reserve(elements)
        self._prefer(elements)
        lines = [f"model {spec.name} {{"]
        for name, value in settings(MODEL_FIELDS, spec.settings, full=True):
            note = self.note(spec.origins.get(name))
            lines.append(f"  {name} = {value}" + (f"  # {note}" if note else ""))
        lines.append("}\n")
        stack = self._pattern(spec.stack)
        tail = self._pattern(spec.mtp.items) if spec.mtp else ""
        lines += [line + "\n" for line in self.emitter.lines]
        if spec.stack:
            lines.append(f"stack {{\n{stack}\n}}\n")
        if spec.mtp:
            args = ", ".join(f"{n}={v}" for n, v in settings(MTP_FIELDS, spec.mtp.settings, full=True))
            lines.append(f"mtp({args}) {{ {tail} }}\n")
        lines += [parts_text(block) + "\n" for block in spec.parts]
        file = read(from_text("\n".join(lines), name=f"expand({spec.name})"))
        expects = tuple(_inlined(e) for e in spec.expects)
        return write(replace(file, statements=(*file.statements, *expects)))

    def _reserve(self, elements: tuple[Element, ...]) -> None:
        """Shared items keep their names: weights are named by them."""
        for element in elements:
            if isinstance(element, Block):
                if element.shared:
                    self.emitter.reserve(element.shared)
                    self.uses.setdefault(element.shared, []).append(element)
                self._reserve(element.items)

    def _prefer(self, elements: tuple[Element, ...]) -> None:
        """Layers that are used as declared keep their names where they can."""
        for element in elements:
            if isinstance(element, Block):
                self._prefer(element.items)
            elif isinstance(element, Use):
                self.emitter.prefer(element.layer)

    def _pattern(self, elements: tuple[Element, ...]) -> str:
        return "\n".join(self._element(e) for e in elements)

    def _element(self, element: Element) -> str:
        match element:
            case Cut():
                return "|"
            case Use():
                return self.emitter.use(element.layer)
            case Block() if element.shared:
                return self._shared(element)
        inner = self._named(element) if element.name else self._group(element.items)
        return f"{inner}*{element.count}" if element.count > 1 else inner

    def _named(self, block: Block) -> str:
        key = (block.name, block.items)
        if key not in self.blocks:
            inner = self._group(block.items)
            name = self.blocks[key] = self.emitter.free(block.name)
            self.emitter.declare(f"layer {name} = {inner}")
        return self.blocks[key]

    def _group(self, items: tuple[Element, ...]) -> str:
        """In brackets, but for a single name or group."""
        inner = " ".join(self._element(e) for e in items)
        group = isinstance(items[0], Block) and inner.startswith("[") and inner.endswith("]")
        return inner if len(items) == 1 and (group or single(inner)) else f"[{inner}]"

    def _shared(self, block: Block) -> str:
        name = block.shared
        layers = _layers(block)
        if name not in self.declared:
            uses = [_layers(use) for use in self.uses[name]]
            self.declared[name] = declared_use(uses)
            items = self.uses[name][uses.index(self.declared[name])].items
            single = len(items) == 1 and isinstance(items[0], Use)
            inner = self.emitter.inline(items[0].layer, name) if single else self._group(items)
            self.emitter.declare(f"shared {name} = {inner}")
        if layers == self.declared[name]:
            return name
        return f"{name}({adapter_text(own_adapter(layers))})"


def _layers(element: Element) -> list[LayerSpec]:
    """All layers of an element, laid out."""
    if isinstance(element, Use):
        return [element.layer]
    return [layer for item in element.items for layer in _layers(item)] * element.count


def _note(origin: Origin | None) -> str | None:
    if origin is None or origin.how == "default":
        return "default"
    place = str(origin.span) if origin.how == "given" else origin.span.source.name
    return "".join(c if c.isprintable() else "?" for c in place)


def _inlined(expect: ExpectSpec) -> tree.Expect:
    """The statement with constants of its file replaced by their values."""

    scope = expect.scope

    def walk(node):
        match node:
            case tree.Term(args=None, name=name) if scope.constant(name.text) and name.text not in FACTS:
                return exact.node(scope.lookup(name))
            case tree.Binary():
                return replace(node, left=walk(node.left), right=walk(node.right))
            case tree.Negative() | tree.Paren():
                return replace(node, value=walk(node.value))
            case tree.Term() if node.args:
                args = tuple(replace(a, value=walk(a.value)) for a in node.args)
                return replace(node, args=args)
        return node

    return replace(expect.node, left=walk(expect.node.left), right=walk(expect.node.right))
