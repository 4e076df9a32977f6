"""What cannot be built yet, or at all: LayerGraph -> diagnostics."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.graph.checks.legal import listed
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.kinds.registry import get
from mambadsl.kinds.residual import form_of
from mambadsl.kinds.sublayer import adapted_weights
from mambadsl.spec.model import Mixer
from mambadsl.text.diagnostic import Diagnostic, declare

E901 = declare(
    "E901",
    "not built yet",
    """
    The language knows this, checks it, counts and plans it, but no torch module exists for it yet: adapters of
    projections that are inside of something wider (those of experts, x_proj and dt_proj of Mamba-1). Everything
    around it can be built: take it out, or keep it and use
    `check`, `plan` and `summary`.
    """,
)
E906 = declare(
    "E906",
    "the residual form does not fit what the layer reads",
    """
    `residual=normed` adds the normed input itself to the stream (alpha * norm(x) + beta * f(norm(x))). A
    layer with `input=with_embedding` norms the stream and the first embedding side by side, which is twice
    as wide as the stream. Use `pre`, `post` or `sandwich` for such a layer.
    """,
)

def problems(graph: LayerGraph) -> list[Diagnostic]:
    """Everything that keeps the graph from being built."""
    return [*_missing(graph), *_unfitting(graph)]


def _missing(graph: LayerGraph) -> Iterator[Diagnostic]:
    # A definition used many times is one problem.
    seen: set = set()
    for node in graph.nodes:
        for path, _, mixer in node.branches():
            if not (inside := _inside(graph, node, mixer)):
                continue
            origin = mixer.origins.get("adapter")
            span = (origin.span if origin else None) or mixer.span or node.span
            key = span or path
            if key in seen:
                continue
            seen.add(key)
            names = listed(f"`{name}`" for name in inside)
            message = f"the adapter of {names} in layer `{path}` (`{node.layer.label}`) is not built yet"
            yield Diagnostic(E901, message, span, help=("give it other `targets`, or set `adapter=none`",))


def _inside(graph: LayerGraph, node: Node, mixer: Mixer) -> list[str]:
    """The projections that have an adapter, and no slot whose function could be given it."""
    kind = get(mixer.kind)
    table = kind.weights(mixer.fields, node.dims(graph.model.d_model))
    names = [w.name.removesuffix(".weight") for w in adapted_weights(mixer.branch, table)]
    return [name for name in names if kind.slot_of(name) is None]


def _unfitting(graph: LayerGraph) -> Iterator[Diagnostic]:
    seen: set[int] = set()
    for node in graph.nodes:
        if node.role is not Role.LAYER or id(node.layer) in seen:
            continue
        seen.add(id(node.layer))
        sub = node.layer.sub
        if form_of(sub.residual).keeps_normed and sub.input == "with_embedding":
            message = f"layer `{node.path}` adds its normed input, which is twice as wide as the stream"
            help = ("`residual` may be `pre`, `post` or `sandwich` here",)
            yield Diagnostic(E906, message, _place(node), help=help)


def _place(node: Node):
    origin = node.layer.origins.get("residual")
    return (origin.span if origin else None) or node.layer.span or node.span
