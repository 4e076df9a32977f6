"""A configuration of Hugging Face's -> our graph, and where each of its weights lies among their tensors.

In: `Settings`. Out: `Imported`. Raises MdlError with every setting that has no counterpart (E611).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from mambadsl.adapt.table import Unlike, read_fields
from mambadsl.adapt.tensors import Rows, rows
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.graph.unroll import connect
from mambadsl.graph.weights import all_weights, node_weights
from mambadsl.hf.balance import balanced
from mambadsl.hf.config import E610, E611, Settings
from mambadsl.hf.family import Family, Layer, NormAt, both, families
from mambadsl.kinds.residual import AFFINE_TERMS
from mambadsl.spec import make
from mambadsl.spec.model import LayerSpec, MtpSpec
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.spell import nearest

#: Of a depth of the tail, by the last part of their path.
ENDS = {"in": Role.MTP_IN, "out": Role.MTP_OUT}


@dataclass(frozen=True)
class Imported:
    """places: our weight's path -> theirs. at: the path of each layer of ours -> theirs (a prefix of
    tensors), shared ones apart.
    diagnostics: settings that were not looked at. inside: it is the text model of a larger one."""

    family: Family
    graph: LayerGraph
    places: dict[str, Rows]
    at: dict[str, str]
    diagnostics: tuple[Diagnostic, ...]
    inside: bool = False


def import_settings(c: Settings, *, name: str, tail: bool | None = None) -> Imported:
    """name: the model's. tail: whether what predicts further tokens is taken along (default: where the file says that
    there is some). Raises MdlError."""
    family = family_of(c)
    tables = (family.settings, *(recipe.fields for recipe in family.recipes.values()))
    c.asked.update(family.follows, *(both(entry).keys for table in tables for entry in table.values()))
    problems = list(_demanded(c, family))
    model = make.settings(_read(c, family.settings, problems))
    specs = {}
    laid = list(family.layers(c))
    ahead = [list(family.tail.layers(c, k)) for k in range(_depths(c, family, tail, problems))]
    for recipe in {recipe: None for layer in chain(laid, *ahead) for recipe in layer.recipes}:
        entry = family.recipes[recipe]
        fields = _read(c, entry.fields, problems)
        if not problems:
            specs[recipe] = _named(make.layer(entry.kind, model=model, **fields), recipe)
    if problems:
        raise MdlError(problems)
    nodes = [Node("embed", Role.EMBED, None, "embed"), *_nodes("stack", laid, specs)]
    nodes.append(Node("head", Role.HEAD, None, "head"))
    for k, layers in enumerate(ahead):
        at = f"mtp.{k}"
        ends = (Node(f"{at}.{end}", role, None, f"{at}.{end}") for end, role in ENDS.items())
        nodes += (next(ends), *_nodes(at, layers, specs), *ends)
    mtp = MtpSpec(make.tail({"depths": len(ahead)}), ()) if ahead else None
    graph = balanced(LayerGraph(name, model, tuple(nodes), connect(nodes, model), mtp), c)
    at = {node.path: layer.paths[0] for node, layer in zip(graph.layers, laid) if not node.shared}
    places = _places(c, family, graph, [*laid, *chain(*ahead)])
    return Imported(family, graph, places, at, tuple(c.ignored()), bool(c.inside))


def says_tail(c: Settings) -> bool | None:
    """Whether the file says that something predicts further tokens; None where it says nothing of it."""
    tail = family_of(c).tail
    if tail is None or not any(key in c.given for key in tail.keys):
        return None
    return any(c.get(key) for key in tail.keys)


def _depths(c: Settings, family: Family, tail: bool | None, problems: list[Diagnostic]) -> int:
    if family.tail is None:
        return 0
    c.asked.update(family.tail.keys, family.tail.follows)
    if not (says_tail(c) if tail is None else tail):
        return 0
    try:
        return family.tail.depths(c)
    except Unlike as error:
        key = next((key for key in family.tail.keys if key in c.given), family.tail.keys[0])
        problems.append(Diagnostic(E611, f"`{key}` {error}", c.span(key)))
        return 0


def _nodes(prefix: str, laid: list[Layer], specs: dict[str, LayerSpec]) -> Iterator[Node]:
    for i, layer in enumerate(laid):
        path = f"{prefix}.{i}"
        yield Node(path, Role.LAYER, _joined([specs[r] for r in layer.recipes]), layer.owner or path)


def family_of(c: Settings) -> Family:
    """Raises MdlError (E610)."""
    known = families()
    model_type = c.config.model_type
    if model_type in known:
        return known[model_type]
    near = nearest(model_type, known)
    help = ((f"did you mean `{near}`?",) if near else ()) + ("known: " + ", ".join(known),)
    message = f"models of the type `{model_type}` have no counterpart yet"
    raise MdlError([Diagnostic(E610, message, c.span("model_type"), help=help)])


def _demanded(c: Settings, family: Family) -> Iterator[Diagnostic]:
    for name, wanted in family.demands.items():
        value = c.get(name)
        if value is not None and value != wanted and not _same(value, wanted):
            message = f"`{name}` is `{value}`; only `{wanted}` has a counterpart"
            yield Diagnostic(E611, message, c.span(name))


def _same(value: Any, wanted: Any) -> bool:
    return isinstance(wanted, (list, tuple)) and isinstance(value, (list, tuple)) and list(value) == list(wanted)


def _read(c: Settings, table: dict[str, Any], problems: list[Diagnostic]) -> dict[str, Any]:
    def report(name: str, says: str) -> None:
        problems.append(Diagnostic(E611, f"`{name}` {says}", c.span(name)))

    return read_fields(c, table, report)


def _named(layer: LayerSpec, name: str) -> LayerSpec:
    return replace(layer, name=name, branches=tuple(replace(b, name=name) for b in layer.branches))


def _joined(layers: list[LayerSpec]) -> LayerSpec:
    if len(layers) == 1:
        return layers[0]
    return LayerSpec(tuple(b for layer in layers for b in layer.branches), layers[0].sub)


def _places(c: Settings, family: Family, graph: LayerGraph, laid: list[Layer]) -> dict[str, Rows]:
    """Every weight of the graph, and nothing else. laid: of the stack, and then of each depth."""
    found: dict[str, Rows] = {"embed.weight": rows(family.embed)}
    found |= _norm("embed_norm", family.embed_norm) | _norm("final_norm", family.final)
    if not graph.tied:
        found["head.weight"] = rows(family.head)
    for k in range(graph.mtp.settings.depths if graph.mtp else 0):
        for ours, theirs in family.tail.ends(c, k).items():
            found |= _norm(f"mtp.{k}.{ours}", theirs)
    layers = [node for node in graph.nodes if node.layer is not None]
    for node, layer in zip(layers, laid, strict=True):
        found |= _norm(f"{node.owner}.norm", layer.norm) | _norm(f"{node.owner}.post_norm", layer.post_norm)
        for term, at in zip(AFFINE_TERMS, layer.affine):
            found |= _norm(f"{node.owner}.{term}", at)
        for (own, prefix, mixer), recipe, at in zip(node.branches(), layer.recipes, layer.paths, strict=True):
            names = {**family.recipes[recipe].places(mixer.fields), **layer.names}
            # Of a shared layer, some weights are each use's own.
            for before in {f"{prefix}.": None, f"{own}.mixer.": None}:
                for path, _ in node_weights(graph, node):
                    if path.startswith(before):
                        name = path.removeprefix(before)
                        found[path] = rows(names.get(name, name)).below(at)
    return {path: found[path] for path in all_weights(graph)}


def _norm(ours: str, theirs: NormAt) -> dict[str, Rows]:
    """The scale of a norm, and the shift that some have."""
    both = (theirs, f"{theirs.removesuffix('.weight')}.bias") if isinstance(theirs, str) else theirs
    return {f"{ours}.{w}": rows(name) for w, name in zip(("weight", "bias"), both)}
