"""ModelSpec -> text with every default written out: a valid file that compiles to the same graph.

Imports, constants and expressions are gone: each field is there with its value. `origin=True` adds to
each where it came from, as comments.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from mambadsl.spec.emit import Emitter, adapter_text, settings
from mambadsl.spec.model import MODEL_FIELDS, MTP_FIELDS, Block, Cut, Element, ExpectSpec, ModelSpec, Origin, Use
from mambadsl.spec.exact import number
from mambadsl.spec.parts import parts_text
from mambadsl.spec.values import Problem
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
        self.shared: dict[str, Block] = {}
        self.blocks: dict[tuple, str] = {}

    def text(self) -> str:
        spec = self.spec
        self._reserve(spec.stack)
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
        """Shared items keep their names (weights are named by them), and so do layers used as declared."""
        for element in elements:
            if isinstance(element, Block):
                if element.shared:
                    self.emitter.reserve(element.shared)
                self._reserve(element.items)
            elif isinstance(element, Use) and element.layer.name and len(element.layer.branches) == 1:
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
        inner = self._group(element.items)
        if element.name:
            key = (element.name, element.items)
            if key not in self.blocks:
                self.blocks[key] = self.emitter.free(element.name)
                self.emitter.declare(f"layer {self.blocks[key]} = {inner}")
            inner = self.blocks[key]
        return f"{inner}*{element.count}" if element.count > 1 else inner

    def _group(self, items: tuple[Element, ...]) -> str:
        """In brackets, but for a single name."""
        inner = " ".join(self._element(e) for e in items)
        bare = len(items) == 1 and (single(inner) or isinstance(items[0], Block) and inner.startswith("["))
        return inner if bare and not inner[-1].isdigit() else f"[{inner}]"

    def _shared(self, block: Block) -> str:
        name = block.shared
        if name not in self.shared:
            self.shared[name] = block
            self.emitter.declare(f"shared {name} = {self._group(block.items)}")
        first, now = list(_uses(self.shared[name])), list(_uses(block))
        if [u.layer for u in first] == [u.layer for u in now]:
            return name
        return f"{name}({adapter_text(now[0].layer.branches[0].branch.adapter)})"


def _uses(element: Element):
    if isinstance(element, Use):
        yield element
    elif isinstance(element, Block):
        for _ in range(element.count):
            for item in element.items:
                yield from _uses(item)


def _note(origin: Origin | None) -> str | None:
    if origin is None or origin.how == "default":
        return "default"
    return str(origin.span) if origin.how == "given" else origin.span.source.name


def _inlined(expect: ExpectSpec) -> tree.Expect:
    """The statement with constants of its file replaced by their values."""

    def walk(node):
        match node:
            case tree.Term(args=None) if node.name.text in (*expect.scope.lets, *expect.scope.imports):
                try:
                    value = expect.scope.lookup(node.name)
                except Problem:
                    return node
                if isinstance(value, Fraction):
                    return tree.Number(number_text(value), value, span=node.span)
                return node
            case tree.Binary():
                return replace(node, left=walk(node.left), right=walk(node.right))
            case tree.Negative() | tree.Paren():
                return replace(node, value=walk(node.value))
            case tree.Term() if node.args:
                args = tuple(replace(a, value=walk(a.value)) for a in node.args)
                return replace(node, args=args)
        return node

    return replace(expect.node, left=walk(expect.node.left), right=walk(expect.node.right))
