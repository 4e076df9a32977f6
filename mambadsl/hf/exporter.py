"""A graph of ours -> the configuration of the family that it fits.

The tables of a family are read backwards, and what comes out is imported again: only where that is the same graph, up
to what changes nothing that a trained model computes, does the family fit. Otherwise E614 says what stands in the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mambadsl.adapt.same import differences, misfit
from mambadsl.adapt.table import Unlike
from mambadsl.graph.graph import LayerGraph, Node
from mambadsl.hf import balance
from mambadsl.hf.config import Settings, config_class, from_dict
from mambadsl.hf.family import Family, Recipe, Row, both, families
from mambadsl.hf.importer import Imported, import_settings
from mambadsl.kinds.values import Values
from mambadsl.spec import make
from mambadsl.spec.model import LayerSpec, Mixer
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare

E614 = declare(
    "E614",
    "no family of Hugging Face's fits",
    """
    Hugging Face has a class for each family of models, and none of them computes what this model does. The notes
    say, for the family that comes closest, which layers and settings stand in its way; `--family NAME` asks for
    another one. What has no influence on results (chunks, initial values, dropout) does not count.
    """,
)
TOKENS = "pad_token_id", "bos_token_id", "eos_token_id"


def export_settings(
    graph: LayerGraph, *, base: Settings | None = None, family: str | None = None
) -> tuple[Settings, Imported]:
    """The settings, and where their tensors lie.

    base: the settings that the model was imported with: as they are, where they still say this model; otherwise what
    they say beside it is kept. family: a model_type (default: the base's, or the first that fits). Raises MdlError
    (E614).
    """
    known = families()
    if base is not None and known[base.config.model_type].config:
        # Of a library that is only read.
        base = None
    if base is not None and family in (None, base.config.model_type):
        found = import_settings(base, name=graph.name, tail=graph.mtp is not None)
        if not list(differences(graph, found.graph)):
            return _rebalanced(base, graph, found)
    if family is not None and family not in known:
        from mambadsl.text.spell import nearest

        near = nearest(family, known)
        help = ((f"did you mean `{near}`?",) if near else ()) + ("families: " + ", ".join(known),)
        raise MdlError([Diagnostic(E614, f"there is no family `{family}`", help=help)])
    wanted = family or (base.config.model_type if base is not None else None)
    # Of families by name, also what is only read is tried, to say so.
    candidates = [wanted] if wanted else [name for name, one in known.items() if one.config is None]
    tried = {name: _tried(graph, known[name], base) for name in candidates}
    for found in tried.values():
        if not isinstance(found, _Misfit):
            return found
    closest = min(tried, key=lambda name: tried[name].distance)
    what = f"the family `{closest}`" if wanted else f"any family of Hugging Face's; `{closest}` comes closest"
    raise misfit(E614, graph, what, tried[closest].problems)


def _rebalanced(base: Settings, graph: LayerGraph, found: Imported) -> tuple[Settings, Imported]:
    """The base where its experts are balanced as the graph's; else the base with settings that say so."""
    wanted = balance.written(graph)
    if wanted == balance.written(found.graph) or not balance.knows(base.config):
        return base, found
    settings = from_dict({**base.given, **wanted})
    return settings, import_settings(settings, name=graph.name, tail=graph.mtp is not None)


#: What stands in the way, and at which layer.
_Problems = list[tuple[str, Node | None]]


@dataclass(frozen=True)
class _Misfit:
    """distance: how much would have to change, to tell which family comes closest."""

    problems: _Problems
    distance: int


def _tried(graph: LayerGraph, family: Family, base: Settings | None) -> tuple[Settings, Imported] | _Misfit:
    named, problems = _named(graph, family)
    if problems:
        return _Misfit(problems, 2 * len(problems))
    try:
        given = {"model_type": family.model_type, "architectures": [family.architecture]}
        if base is not None and base.config.model_type == family.model_type:
            given |= {k: v for k, v in base.given.items() if family.tail is None or k not in family.tail.keys}
        written = _written(graph, family, named)
        if balance.knows(config := config_class(family.model_type)()):
            written = {**written, **balance.written(graph)}
        usual = config.to_dict()
        written = {name: _typed(v, usual.get(name)) for name, v in written.items()}
        # The class's own numbers of tokens may lie beyond this vocabulary.
        beyond = {n: None for n in TOKENS if n not in given and _beyond(usual.get(n), graph.model.vocab)}
        settings = from_dict(given | beyond | written)
        found = import_settings(settings, name=graph.name, tail=graph.mtp is not None)
    except Unlike as error:
        return _Misfit([(str(error), None)], 2 * len(graph.layers))
    except MdlError as error:
        return _Misfit([(d.message, None) for d in error.diagnostics], 2 * len(graph.layers))
    problems = list(differences(graph, found.graph))
    return _Misfit(problems, len(problems)) if problems else (settings, found)


def _named(graph: LayerGraph, family: Family) -> tuple[list[Row], _Problems]:
    """The recipes of each layer of the stack and of a depth, or the layers that have none."""
    rows, problems = [], []
    if graph.mtp is not None and family.tail is None:
        problems.append(("the heads of `mtp` have no counterpart", None))
    for node in _one_of_each(graph):
        names = [_recipe(mixer, node.layer, family, graph.model) for mixer in node.layer.branches]
        if None in names:
            mixer = node.layer.branches[names.index(None)]
            problems.append((f"{node.path}: `{mixer.kind}` as it is here", node))
        else:
            rows.append(Row(names, node.owner))
    return rows, problems


def _one_of_each(graph: LayerGraph) -> tuple[Node, ...]:
    """The layers of the stack, and those of the first depth."""
    return (*graph.layers, *(n for n in graph.nodes if n.layer is not None and n.depth == 0))


def _recipe(mixer: Mixer, layer: LayerSpec, family: Family, model: Values) -> str | None:
    """The recipe of this kind whose fixed fields the layer has."""
    for name, recipe in family.recipes.items():
        if recipe.kind == mixer.kind:
            fixed = {f: entry.read(None) for f, entry in _entries(recipe) if entry.always}
            wanted = _values(make.layer(recipe.kind, model=model, **fixed), 0)
            found = _values(layer, layer.branches.index(mixer))
            if all(found[f] == wanted[f] for f in fixed):
                return name
    return None


def _entries(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    yield from ((field, both(entry)) for field, entry in recipe.fields.items())


def _values(layer: LayerSpec, branch: int) -> Values:
    """All fields of one branch: its kind's, its own, the sublayer's."""
    mixer = layer.branches[branch]
    return Values({**mixer.fields, **mixer.branch, **layer.sub})


def _written(graph: LayerGraph, family: Family, rows: list[Row]) -> Mapping[str, Any]:
    """Their settings; each recipe's are those of the first layer that has it. Raises Unlike."""
    found: dict[str, Any] = {}
    for ours, entry in family.settings.items():
        _merge(found, both(entry).write(graph.model[ours]))
    fields: dict[str, Values] = {}
    for node, row in zip(_one_of_each(graph), rows):
        for i, name in enumerate(row):
            fields.setdefault(name, _values(node.layer, i))
    for name, values in fields.items():
        for ours, entry in _entries(family.recipes[name]):
            _merge(found, entry.write(values[ours]))
    stack, ahead = rows[: len(graph.layers)], rows[len(graph.layers) :]
    found |= family.order(stack)
    if family.tail is not None:
        found |= family.tail.settings(graph.mtp.settings.depths if graph.mtp else 0, ahead)
    return found | (family.derived(fields, graph.model) if family.derived else {})


def _merge(found: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Settings that have parts by type of layer come from several recipes."""
    for name, value in more.items():
        before = found.get(name)
        found[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value


def _beyond(token: Any, vocab: int) -> bool:
    return any(t is not None and t >= vocab for t in (token if isinstance(token, list) else [token]))


def _typed(value: Any, usual: Any) -> Any:
    """Whole numbers of ours are ints; configuration classes insist on their own types."""
    if isinstance(usual, list) and isinstance(value, list) and usual:
        return [_typed(v, usual[0]) for v in value]
    return float(value) if isinstance(usual, float) and isinstance(value, int) else value
