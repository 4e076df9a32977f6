"""A pattern and arguments of Megatron's -> our graph, and where each of its weights lies among their tensors.

In: `Pattern`, `Arguments` or None (the layers have our defaults then). Out: `Imported`. Places of layers are those in
the pattern, so what the checks find points there. Raises MdlError (E620, E621) with every problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mambadsl.adapt.table import Entry, Unlike, both, read_fields
from mambadsl.adapt.tensors import Rows, rows
from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.graph.unroll import unroll
from mambadsl.graph.weights import all_weights, node_weights
from mambadsl.kinds.registry import get
from mambadsl.kinds.values import Values
from mambadsl.megatron.arguments import E621, W622, Arguments
from mambadsl.megatron.layers import LAYERS
from mambadsl.megatron.pattern import E620, LETTERS, Pattern, from_ratios, read_pattern, stages
from mambadsl.megatron.settings import DEMANDS, SETTINGS, SHARED, spec
from mambadsl.spec import make
from mambadsl.spec.model import MTP_FIELDS, Cut, Element, LayerSpec, ModelSpec, MtpSpec, Origin, Use
from mambadsl.text.diagnostic import Diagnostic, MdlError
from mambadsl.text.source import Span

#: Our weight -> their tensor, of everything that is no layer.
OUTSIDE = {"embed.weight": "embedding.word_embeddings.weight", "head.weight": "output_layer.weight"}
#: What has other names in what predicts further tokens.
TAIL = {"final_norm": "final_layernorm"}


@dataclass(frozen=True)
class Imported:
    """stages: layers of each pipeline segment. places: our weight's path -> theirs, layers numbered from 0 over all
    segments. diagnostics: arguments that were not looked at."""

    pattern: Pattern
    arguments: Arguments | None
    graph: LayerGraph
    stages: tuple[int, ...]
    places: dict[str, Rows]
    diagnostics: tuple[Diagnostic, ...] = ()


def pattern_of(c: Arguments) -> Pattern | None:
    """What the arguments themselves say: a pattern, or shares of layers. Raises MdlError."""
    text = c.hybrid_layer_pattern
    if text is None and c.num_layers and (c.hybrid_attention_ratio or c.hybrid_mlp_ratio):
        try:
            text = from_ratios(c.num_layers, c.hybrid_attention_ratio or 0, c.hybrid_mlp_ratio or 0)
        except ValueError as error:
            raise MdlError([Diagnostic(E621, f"{error}", c.span("hybrid_attention_ratio"))]) from None
    if text is None:
        return None
    if (tail := c.mtp_hybrid_override_pattern) and "/" not in text:
        text = "/".join([text, *[tail] * (c.mtp_num_layers or 1)])
    return read_pattern(text)


def import_model(pattern: Pattern, c: Arguments | None = None, *, name: str) -> Imported:
    """name: the model's. Raises MdlError."""
    problems = list(_unknown(pattern))
    if c is not None:
        problems += _demanded(c, pattern)
    model = make.settings(_read(c, SETTINGS, problems) if c is not None else {})
    laid = _Laid(c, model, problems)
    stack = [laid.layer(pattern, i, letter) for i, letter in enumerate(pattern.layers)]
    tail = [laid.tail(pattern, i, letter) for i, letter in enumerate(pattern.mtp)]
    if problems:
        raise MdlError(list({d.message: d for d in problems}.values()))
    ranks, ends = 1, {}
    if c is not None:
        ranks = c.pipeline_model_parallel_size
        ends = {"first": c.decoder_first_pipeline_num_layers, "last": c.decoder_last_pipeline_num_layers}
    counts = stages(pattern, ranks, **ends)
    mtp = MtpSpec(_tail_settings(pattern, c), tuple(tail)) if pattern.depths else None
    graph = unroll(ModelSpec(name, model, tuple(_cut(stack, counts, pattern)), mtp))
    ignored = (*_overruled(c, pattern), *c.ignored()) if c is not None else ()
    return Imported(pattern, c, graph, counts, places(graph, pattern), ignored)


@dataclass
class _Laid:
    """Makes layers of letters; what stands in the way is collected."""

    c: Arguments | None
    model: Values
    problems: list[Diagnostic]

    def layer(self, pattern: Pattern, i: int, letter: str) -> Use | None:
        return self._use(letter, i + 1, pattern.layers, pattern.span(i))

    def tail(self, pattern: Pattern, i: int, letter: str) -> Use | None:
        at = len(pattern.main) + 1 + i
        return self._use(letter, i + 1, pattern.mtp, Span(pattern.source, at, at + 1))

    def _use(self, letter: str, number: int, letters: str, span: Span) -> Use | None:
        if letter not in LAYERS:
            return None
        recipe = LAYERS[letter].recipe
        table, fields = {**recipe.fields, **SHARED}, {}
        before = len(self.problems)
        if self.c is not None:
            fields = _read(self.c.at(number, letters), table, self.problems)
        if len(self.problems) > before:
            return None
        made = make.layer(recipe.kind, model=self.model, **fields)
        return Use(self._named(made, get(recipe.kind).letter, table, span), span)

    def _named(self, made: LayerSpec, name: str, table: Mapping[str, Entry], span: Span) -> LayerSpec:
        origins = {}
        for ours, entry in table.items():
            given = [at for key in both(entry).keys if self.c is not None and (at := self.c.span(key)) is not None]
            if given:
                origins[ours] = Origin("given", given[-1])
        branches = tuple(replace(b, name=name, span=span, origins=origins) for b in made.branches)
        return replace(made, name=name, span=span, branches=branches)


def _read(c: Arguments, table: Mapping[str, Entry], problems: list[Diagnostic]) -> dict[str, Any]:
    return read_fields(c, table, lambda name, says: problems.append(_unlike(c, name, says)))


def _unlike(c: Arguments, name: str, says: str) -> Diagnostic:
    return Diagnostic(E621, f"{c.shown(name)} {says}", c.span(name))


def _unknown(pattern: Pattern) -> Iterator[Diagnostic]:
    """Letters of theirs that are no kind of ours."""
    for at, letter in enumerate(pattern.source.text):
        if letter in LETTERS and letter not in LAYERS:
            message = f"`{letter}`, {LETTERS[letter]}, has no counterpart"
            yield Diagnostic(E620, message, Span(pattern.source, at, at + 1))


def _demanded(c: Arguments, pattern: Pattern) -> Iterator[Diagnostic]:
    for name, (wanted, says) in DEMANDS.items():
        if getattr(c, name) != wanted:
            yield _unlike(c, name, f"{says}, which has no counterpart")
    try:
        spec(c)
    except Unlike as error:
        yield _unlike(c, "spec", str(error))
    if "*" not in pattern.layers and c.position_embedding_type not in ("none", "rope"):
        yield _unlike(c, "position_embedding_type", f"is `{c.position_embedding_type}`; `none` has a counterpart")
    other = pattern_of(c)
    if other is not None and (other.layers, other.mtp, other.depths) != (pattern.layers, pattern.mtp, pattern.depths):
        yield _unlike(c, "hybrid_layer_pattern", f"is another pattern than `{pattern.source.text}`")
    if c.form == "flags" and c.num_query_groups is not None and not c.group_query_attention:
        yield _unlike(c, "num_query_groups", "says nothing without `--group-query-attention`: Megatron ignores it")


def _overruled(c: Arguments, pattern: Pattern) -> Iterator[Diagnostic]:
    """Numbers that the pattern says otherwise."""
    counts = {"num_layers": (len(pattern.layers), "layers"), "mtp_num_layers": (pattern.depths, "predicted tokens")}
    for name, (counted, what) in counts.items():
        if (given := getattr(c, name)) is not None and given != counted:
            message = f"{c.shown(name)} is {given}, and the pattern has {counted} {what}: Megatron goes by that"
            yield Diagnostic(W622, message, c.span(name))


def _tail_settings(pattern: Pattern, c: Arguments | None) -> Values:
    shared = c is not None and c.mtp_use_repeated_layer
    given = {"depths": pattern.depths, "weights": "shared" if shared else "own"}
    return Values({f.name: given.get(f.name, f.default) for f in MTP_FIELDS})


def _cut(stack: list[Use], counts: tuple[int, ...], pattern: Pattern) -> Iterator[Element]:
    """The layers with a cut after each segment but the last."""
    cuts = iter([i for i, mark in enumerate(pattern.main) if mark == "|"])
    at = 0
    for count in counts[:-1]:
        yield from stack[at : at + count]
        at += count
        place = next(cuts, None)
        yield Cut(Span(pattern.source, place, place + 1) if place is not None else None)
    yield from stack[at:]


def places(graph: LayerGraph, pattern: Pattern) -> dict[str, Rows]:
    """Every weight of the graph, and nothing else."""
    found = {ours: rows(theirs) for ours, theirs in OUTSIDE.items()}
    weights = all_weights(graph)
    for letter, node in zip(pattern.layers, graph.layers, strict=True):
        found |= _below(graph, node, letter, f"decoder.layers.{node.path.rpartition('.')[2]}")
    for node in graph.nodes:
        if node.layer and node.path.startswith("mtp."):
            _, depth, i = node.owner.split(".")
            found |= _below(graph, node, pattern.mtp[int(i)], f"mtp.layers.{depth}.mtp_model_layer.layers.{i}")
    for path in weights:
        if path.startswith("final_norm."):
            found[path] = rows(f"decoder.{path}")
        elif path.startswith("mtp.") and path not in found:
            _, depth, module, kind = path.split(".")
            found[path] = rows(f"mtp.layers.{depth}.{TAIL.get(module, module)}.{kind}")
    return {path: found[path] for path in weights}


def _below(graph: LayerGraph, node: Node, letter: str, at: str) -> dict[str, Rows]:
    known = LAYERS[letter]
    [(_, prefix, mixer)] = node.branches()
    names = known.recipe.places(mixer.fields)
    found = {f"{node.owner}.norm.{w}": rows(f"{at}.{known.norm.format(w)}") for w in ("weight", "bias")}
    for path, _ in node_weights(graph, node):
        if path.startswith(f"{prefix}."):
            name = path.removeprefix(f"{prefix}.")
            found[path] = rows(names.get(name, name)).below(f"{at}.{known.path}")
    return found
