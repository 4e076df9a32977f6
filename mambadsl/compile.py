"""The stages, in order: Source -> File -> ModelSpec -> LayerGraph -> CheckedGraph, and what follows.

`load` runs them and gives a `Program`, the value that users hold: graph, plan, text out, torch modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambadsl.graph.checks import CheckedGraph, Facts
    from mambadsl.graph.cost import Cost
    from mambadsl.graph.graph import LayerGraph
    from mambadsl.plan.plan import Plan
    from mambadsl.spec.model import ModelSpec
    from mambadsl.syntax.tree import File
    from mambadsl.text.diagnostic import Diagnostic
    from mambadsl.text.source import Source


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled model: every stage's value, checked."""

    spec: ModelSpec
    checked: CheckedGraph

    @property
    def layers(self) -> LayerGraph:
        """The frozen graph."""
        return self.checked.graph

    @property
    def graph(self) -> Any:
        """A networkx.DiGraph of the model, to read or to edit (`mambadsl.from_networkx` takes it back)."""
        from mambadsl.graph.exchange import to_networkx

        return to_networkx(self.layers)

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Warnings and information (errors never get this far)."""
        return self.checked.diagnostics

    def cost(self, *, length: int | None = None) -> Cost:
        """Totals of the whole model; length: tokens of a sequence (default: the model's context)."""
        from mambadsl.graph.cost import costs, total

        return total(costs(self.layers, length=length))

    def plan(self, **how: Any) -> Plan:
        """Which layers run in which pipeline stage; see `mambadsl.plan.from_graph.plan` for the keywords."""
        from mambadsl.plan.from_graph import plan

        return plan(self.checked, **how)

    def write(self) -> str:
        """The model as `.mdl` text."""
        from mambadsl.graph.write import write

        return write(self.layers)

    def expand(self, *, origin: bool = False) -> str:
        """The model with every default written out; origin: with where each value came from."""
        from mambadsl.spec.expand import expand

        return expand(self.spec, origin=origin)

    def build(self, **how: Any) -> Any:
        """A torch module; see `mambadsl.build.model.build` for the keywords (dtype, device, plan, stage)."""
        from mambadsl.build.model import build

        return build(self.checked, **how)


def load(
    path: str | Path | None = None, *, text: str | None = None, set: Mapping[str, Any] | None = None,
    facts: Facts | None = None,
) -> Program:
    """Compiles a file, or text. set: values from outside by name, as `--set` takes them: text of the language,
    or numbers. facts: of a run, for the checks. Raises MdlError with every problem of the first stage that
    has one."""
    if (path is None) == (text is None) or not isinstance(text, str | None):
        raise TypeError("load() takes a path, or text=")
    from mambadsl.text.source import from_text, read

    source = read(path) if path is not None else from_text(text, name="<text>")
    return compile_source(source, set=set, facts=facts)


def compile_source(source: Source, *, set: Mapping[str, Any] | None = None, facts: Facts | None = None) -> Program:
    from mambadsl.syntax.read import read

    return compile_file(read(source), set=set, facts=facts)


def compile_file(file: File, *, set: Mapping[str, Any] | None = None, facts: Facts | None = None) -> Program:
    from mambadsl.graph.checks import NO_FACTS, check
    from mambadsl.graph.unroll import unroll
    from mambadsl.spec.overrides import override
    from mambadsl.spec.resolve import resolve

    spec = resolve(override(file, set or {}))
    return Program(spec, check(unroll(spec), facts or NO_FACTS))


def program_from_graph(graph: LayerGraph, *, facts: Facts | None = None) -> Program:
    """A Program from a graph that did not come from text: written as text to have a spec, and checked."""
    from mambadsl.graph.checks import NO_FACTS, check
    from mambadsl.graph.exchange import spec_of

    return Program(spec_of(graph), check(graph, facts or NO_FACTS))


def from_networkx(g: Any, *, facts: Facts | None = None) -> Program:
    """A checked Program from a (possibly edited) networkx.DiGraph. Raises MdlError."""
    from mambadsl.graph.exchange import layers_from_networkx

    return program_from_graph(layers_from_networkx(g), facts=facts)
