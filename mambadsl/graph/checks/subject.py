"""What rules look at: a graph with facts, each distinct mixer once, and problems that know their places.

In: LayerGraph, Facts. Out: `Subject`, whose `sites(kind)` are the places of the text that define a mixer,
with the nodes that use it; rules answer with `Problem`s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from mambadsl.graph.checks.facts import Facts
from mambadsl.graph.checks.legal import listed
from mambadsl.graph.cost import Cost, costs, total
from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.kinds.kind import Dims, Kind
from mambadsl.kinds.registry import get
from mambadsl.kinds.values import Values
from mambadsl.parts.part import REFERENCE
from mambadsl.parts.sets import SETS
from mambadsl.spec.model import LayerSpec, Mixer
from mambadsl.syntax import tree
from mambadsl.text.diagnostic import Code, Diagnostic, Label
from mambadsl.text.source import Span

#: Packages whose kernels the rules on kernels know.
KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d")


@dataclass(frozen=True, slots=True)
class Problem:
    """A diagnostic, and the nodes it is about (none: the model). Equal diagnostics become one."""

    diagnostic: Diagnostic
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Site:
    """One mixer, as defined at one place, and the nodes that use it."""

    mixer: Mixer
    layer: LayerSpec
    dims: Dims
    nodes: tuple[Node, ...]

    @property
    def f(self) -> Values:
        return self.mixer.fields

    @property
    def kind(self) -> Kind:
        return get(self.mixer.kind)

    @property
    def span(self) -> Span | None:
        """The whole item: where the mixer is written, or else where it is used."""
        return self.mixer.span or self.layer.span or self.nodes[0].span

    def given(self, field: str) -> Span | None:
        """The argument (of the text, or `--set`) that set the field, if one did."""
        origin = self.mixer.origins.get(field)
        return origin.span if origin is not None else None

    def defaulted(self, field: str) -> bool:
        origin = self.mixer.origins.get(field)
        return origin is not None and origin.how == "default"

    def problem(
        self, code: Code, message: str, fields: tuple[str, ...] = (), *, label: str = "",
        labels: tuple[Label, ...] = (), notes: tuple[str, ...] = (), help: tuple[str, ...] = (),
    ) -> Problem:
        """A problem between `fields`, the guiltiest first: the first that was set gets the caret, the others
        are shown where they were set, or a note says what they are by default."""
        places = [(name, place) for name in fields if (place := self.given(name))]
        span = places[0][1] if places else self.span
        others = tuple(Label(place, f"`{name}` set here") for name, place in places[1:] if place != span)
        values = {**self.mixer.fields, **self.mixer.branch}
        unset = [f"`{name}` is {values[name]}" for name in fields if self.defaulted(name)]
        default = (f"{listed(unset)} by default",) if unset else ()
        diagnostic = Diagnostic(code, message, span, label, others + labels, default + notes, help)
        return Problem(diagnostic, self.nodes)


@dataclass(frozen=True, eq=False)
class Subject:
    """A graph and the facts of a run, with what several rules need computed once."""

    graph: LayerGraph
    facts: Facts

    def sites(self, *kinds: str) -> Iterator[Site]:
        """Every distinct mixer of these kinds (of all kinds where none is named), in order of first use."""
        return (site for site in self._sites if not kinds or site.mixer.kind in kinds)

    def recurrent(self) -> Iterator[Site]:
        return (site for site in self._sites if site.kind.recurrent)

    def attending(self) -> Iterator[Site]:
        return (site for site in self._sites if site.kind.attends)

    @cached_property
    def _sites(self) -> tuple[Site, ...]:
        by_layer: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if node.layer is not None:
                by_layer.setdefault(id(node.layer), []).append(node)
        found: dict[tuple, tuple[Mixer, LayerSpec, Dims, list[Node]]] = {}
        for nodes in by_layer.values():
            layer, dims = nodes[0].layer, nodes[0].dims(self.graph.model.d_model)
            for mixer in layer.branches:
                entry = found.setdefault((mixer, mixer.span, dims), (mixer, layer, dims, []))
                entry[3].extend(nodes)
        return tuple(Site(mixer, layer, dims, tuple(nodes)) for mixer, layer, dims, nodes in found.values())

    @property
    def length(self) -> int:
        return self.facts.length or self.graph.model.context

    @cached_property
    def kernels(self) -> bool:
        """mamba-ssm's and causal-conv1d's kernels will run: the part set has them first for a slot of a kind that the
        model has, a parts block names one, or the target has no other way. (`auto` takes only parts that accept a
        layer's sizes, so nothing can be wrong there.)"""
        if self.facts.tool.mamba_kernels:
            return True
        blocks = {block.name: block for block in self.graph.parts}
        name, named = self.facts.parts, []
        while name in blocks:
            named += [choice.part for choice in blocks[name].choices]
            name = blocks[name].base or REFERENCE
        if name in SETS and not SETS[name].lenient:
            kinds = {site.kind.name for site in self.sites()}
            named += [order[0] for slot, order in SETS[name].order.items() if slot.partition(".")[0] in kinds]
        return any(part.partition(".")[0] in KERNEL_PACKAGES for part in named)

    @cached_property
    def stages(self) -> int:
        """Pipeline stages: as many as asked for, or as the text cuts."""
        return self.facts.pp or 1 + sum(node.cut_after for node in self.graph.nodes)

    @cached_property
    def total(self) -> Cost:
        """The whole model, at its own context."""
        return total(costs(self.graph))

    def setting(self, name: str) -> Span | None:
        """Where the model's setting is written."""
        statements = self.graph.file.statements if self.graph.file else ()
        for statement in statements:
            if isinstance(statement, tree.Model):
                return next((s.span for s in statement.settings if s.name.text == name), None)
        return None

    def declaration(self, node: Node) -> Span | None:
        """Where the shared layer that a node uses is declared (where it is used, if in another file)."""
        name = node.owner.split(".")[1]
        for statement in self.graph.file.statements if self.graph.file else ():
            if isinstance(statement, tree.Layer) and statement.name.text == name:
                return statement.name.span
        return node.span

    def setting_label(self, name: str) -> tuple[Label, ...]:
        span = self.setting(name)
        return (Label(span, f"`{name}` set here"),) if span else ()


def with_uses(diagnostic: Diagnostic, nodes: list[Node]) -> Diagnostic:
    """The diagnostic, and where the layers it is about are used: how often, if more than once; and one place,
    if that is in another file than the caret."""
    labels = diagnostic.labels
    if diagnostic.span and nodes and (use := nodes[0].span) and use.source is not diagnostic.span.source:
        labels += (Label(use, "used here"),)
    return replace(diagnostic, labels=labels, notes=_used(nodes) + diagnostic.notes)


def _used(nodes: list[Node]) -> tuple[str, ...]:
    """`used 6 times: Local (line 15), in lines 19-22` where named blocks hold it, else `used 6 times: W
    (stack.3, stack.7, ...), in lines 19-22`; nothing for a single use."""
    if len(nodes) < 2:
        return ()
    blocks = [next((f for f in reversed(node.trail) if f.chain), None) for node in nodes]
    if all(blocks):
        names = listed(dict.fromkeys(f"{block.label} (line {block.chain[0].line})" for block in blocks))
    else:
        paths = ", ".join(node.path for node in nodes[:3]) + (", ..." if len(nodes) > 3 else "")
        names = f"{listed(dict.fromkeys(node.layer.label for node in nodes))} ({paths})"
    spans = [span for node in nodes if (span := node.trail[0].span if node.trail else node.span)]
    where = ""
    if spans and all(span.source is spans[0].source for span in spans):
        first, last = min(s.line for s in spans), max(s.line for s in spans)
        where = f", in line {first}" if first == last else f", in lines {first}-{last}"
    return (f"used {len(nodes)} times: {names}{where}",)
