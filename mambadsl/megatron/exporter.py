"""A graph of ours -> the pattern and arguments of Megatron's hybrid model that computes the same.

The tables are read backwards, and what comes out is imported again: only where that is the same graph, up to what
changes nothing that a trained model computes, is there such a model. Otherwise E624 names the layers in the way.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mambadsl.adapt.same import differences, misfit
from mambadsl.adapt.table import Entry, both
from mambadsl.graph.checks import Facts, check
from mambadsl.graph.graph import LayerGraph, Node, Role
from mambadsl.kinds.values import Values
from mambadsl.megatron.arguments import Arguments, from_mapping
from mambadsl.megatron.flags import FLAGS, flag_of
from mambadsl.megatron.importer import Imported, import_model
from mambadsl.megatron.layers import LAYERS
from mambadsl.megatron.pattern import read_pattern
from mambadsl.megatron.settings import SETTINGS, SHARED, SPEC
from mambadsl.text.diagnostic import MdlError, declare

E624 = declare(
    "E624",
    "no hybrid model of Megatron's fits",
    """
    Megatron's HybridModel has one mixer a layer, of the sorts that its patterns have letters for, and one set of
    sizes for all layers of a sort; windows and rotations may be left out of some. The notes say which layers and
    settings stand in the way. What has no influence on results (chunks, initial values) does not count.
    """,
)


@dataclass(frozen=True)
class Exported:
    """imported: what importing it gives: the same model."""

    arguments: Mapping[str, Any]
    imported: Imported

    def text(self) -> str:
        """One flag a line, as a shell takes them."""
        lines = (flag_of(name, self.arguments[name]) for name in FLAGS if name in self.arguments)
        return "\n".join(shlex.join(words) for words in lines if words) + "\n"


def export_model(graph: LayerGraph, *, tp: int = 1) -> Exported:
    """tp: tensor ranks. Raises MdlError (E624, and what the checks of `tp` find)."""
    letters = {node.path: _letter(node) for node in graph.nodes if node.role is Role.LAYER}
    if problems := [*_in_the_way(graph, letters)]:
        raise _refused(graph, problems)
    if tp > 1:
        check(graph, Facts(tp=tp))
    text = _pattern(graph, letters)
    arguments = _written(graph, letters) | {"spec": SPEC, "hybrid_layer_pattern": text}
    if tp > 1:
        arguments["tensor_model_parallel_size"] = tp
    pattern = read_pattern(text)
    if len(pattern.segments) > 1:
        arguments["pipeline_model_parallel_size"] = len(pattern.segments)
    try:
        found = import_model(pattern, _arguments(arguments), name=graph.name)
    except MdlError as error:
        raise _refused(graph, [(d.message, None) for d in error.diagnostics]) from None
    if problems := [*differences(graph, found.graph)]:
        raise _refused(graph, problems)
    return Exported(arguments, found)


def _refused(graph: LayerGraph, problems: list[tuple[str, Node | None]]) -> MdlError:
    return misfit(E624, graph, "Megatron's hybrid model", problems)


def _letter(node: Node) -> str | None:
    kinds = [branch.kind for branch in node.layer.branches]
    return next((letter for letter, known in LAYERS.items() if [known.recipe.kind] == kinds), None)


def _in_the_way(graph: LayerGraph, letters: Mapping[str, str | None]) -> Iterator[tuple[str, Node | None]]:
    for node in graph.nodes:
        if node.role is not Role.LAYER:
            continue
        if len(node.layer.branches) > 1:
            yield f"{node.path}: {' + '.join(b.kind for b in node.layer.branches)} side by side", node
        elif letters[node.path] is None:
            yield f"{node.path}: `{node.layer.branches[0].kind}` has no letter", node
        elif node.owner.startswith("shared."):
            yield f"{node.path}: weights that other layers use too", node
    first = {letter: path for path, letter in reversed(letters.items())}
    for latent in {"+"} & first.keys() if "*" in first else ():
        yield f"{first[latent]}: latent attention, beside the attention of {first['*']}", graph.by_path[first[latent]]


def _pattern(graph: LayerGraph, letters: Mapping[str, str | None]) -> str:
    main = "|" if graph.nodes[0].cut_after else ""
    main += "".join(f"{letters[node.path]}{'|' if node.cut_after else ''}" for node in graph.layers)
    depths = graph.mtp.settings.depths if graph.mtp else 0
    tail = "".join(letter for path, letter in letters.items() if path.startswith("mtp.0."))
    return "/".join([main, *[tail] * depths])


def _written(graph: LayerGraph, letters: Mapping[str, str | None]) -> dict[str, Any]:
    """Their arguments; those of a letter are of the first layer that has it."""
    found: dict[str, Any] = {"num_layers": len(graph.layers), "position_embedding_type": "none", "attention_dropout": 0}
    # Their configuration divides by it, also where no layer has heads of attention.
    found["num_attention_heads"] = 1
    if graph.mtp:
        shared = graph.mtp.settings.weights == "shared"
        found |= {"mtp_num_layers": graph.mtp.settings.depths, "mtp_use_repeated_layer": shared}
    found |= _backwards(SETTINGS, graph.model)
    first: dict[str, Values] = {}
    for path, letter in letters.items():
        first.setdefault(letter, _fields(graph.by_path[path]))
    for letter, fields in first.items():
        found |= _backwards({**LAYERS[letter].recipe.fields, **SHARED}, fields)
    return found | _unlike_others(graph, letters)


def _backwards(table: Mapping[str, Entry], values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ours, entry in table.items():
        found |= both(entry).write(values[ours])
    return found


def _fields(node: Node) -> Values:
    mixer = node.layer.branches[0]
    return Values({**mixer.fields, **mixer.branch})


def _unlike_others(graph: LayerGraph, letters: Mapping[str, str | None]) -> dict[str, Any]:
    """Windows and rotations that only some layers of attention have: a row for all layers says which."""
    rows = [_fields(node) if letters[node.path] == "*" else None for node in graph.layers]
    windows = [f and f.window for f in rows]
    ropes = [f and f.rope.name == "rope" for f in rows]
    found: dict[str, Any] = {}
    if (window := next((w for w in windows if w), None)) is not None:
        found["window_size"] = (window - 1, 0)
        if any(f and not f.window for f in rows):
            found["window_attn_skip_freq"] = tuple(int(bool(w)) for w in windows)
    if any(ropes):
        rope = next(f.rope for f, turns in zip(rows, ropes) if turns)
        found |= both(LAYERS["*"].recipe.fields["rope"]).write(rope)
        if any(f and f.rope.name != "rope" for f in rows):
            found["no_rope_freq"] = tuple(int(r is False) for r in ropes)
    return found


def _arguments(given: Mapping[str, Any]) -> Arguments:
    return from_mapping(given, form="flags")
