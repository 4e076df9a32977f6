"""Whether a run may go on from a save: its settings, data and model, by what `run.json` says of them.

In: a save, and what the run is about. Refuses (ValueError) with every difference, before anything is allocated. What
changes how fast a run is, but not what it computes, may differ; so may the schedule of the learning rate, as long as
the steps that were done had the rates that they would have now, and what balances experts.
"""

from __future__ import annotations

import hashlib
from typing import Any

from mambadsl.build.checkpoint import LISTED
from mambadsl.data.rows import Rows
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.json import to_data
from mambadsl.train.balance import FIELDS as BALANCE
from mambadsl.train.save import Saved, misfit
from mambadsl.train.schedule import rate
from mambadsl.train.settings import Settings

#: Settings that may differ.
FREE = ("microbatch", "parts", "compile", "recompute", "gather", "stages", "pipeline", "virtual", "tensor", "dtype")
#: Those that the learning rate follows from.
RATE = ("steps", "lr", "warmup", "schedule", "decay", "floor")
#: Pieces of the data that stand for all of it, and tokens of each.
_PIECES, _TOKENS = 64, 64


def about(graph: LayerGraph, rows: Rows, settings: Settings, *, world: int) -> dict[str, Any]:
    """What a save says of its run, as JSON has it. world: processes."""
    own = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.to_json().items()}
    return {"settings": own, "world": world, "data": _data(rows), "graph": to_data(graph)}


def check(saved: Saved, graph: LayerGraph, own: dict[str, Any]) -> None:
    """ValueError if the save is of another run."""
    try:
        was = saved.about
        found = _settings(own["settings"], was["settings"], saved.step)
        found += _same_data(own["data"], was["data"])
        found += _model(own["graph"], was["graph"]) or misfit(saved, graph)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{saved.folder / 'run.json'}` is of another version, or was changed: {error!r}") from None
    if found:
        lines = [*found[:LISTED], *([f"and {len(found) - LISTED} more"] if len(found) > LISTED else [])]
        raise ValueError("\n".join([
            f"`{saved.folder.parent}` has a run that this one cannot go on with:", *(f"  {line}" for line in lines),
            "Go on as it was begun, or give another folder (-o); --weights begins a new run with exported weights.",
        ]))


def rebalanced(saved: Saved, own: dict[str, Any]) -> list[str]:
    """What balances experts otherwise than before a save that `check` took, layers of one name together."""
    mine, theirs = (_layers(about["graph"]) for about in (own, saved.about))
    lines: dict[str, None] = {}
    for path, layer in mine.items():
        for branch, before in zip(layer["branches"], theirs[path]["branches"]):
            now, was = ({k: v for k, v in b["fields"].items() if k in BALANCE} for b in (branch, before))
            lines |= dict.fromkeys(_fields(f"experts of {branch['name'] or path}:", now, was))
    return list(lines)


def _settings(own: dict[str, Any], was: dict[str, Any], step: int) -> list[str]:
    changed = [f"{name} was {was.get(name)}, is {value}" for name, value in own.items()
               if name not in FREE + RATE and was.get(name) != value]
    rates = [{name: settings[name] for name in RATE} for settings in (own, was)]
    if own["steps"] < step:
        return [*changed, f"{step} steps are done, steps is {own['steps']}"]
    if rates[0] != rates[1] and any(rate(s, **rates[0]) != rate(s, **rates[1]) for s in range(step)):
        why = f"the {step} steps that are done would have had other learning rates"
        changed += [f"{name} was {rates[1][name]}, is {rates[0][name]}: {why}" for name in RATE
                    if rates[0][name] != rates[1][name]]
    return changed


def _data(rows: Rows) -> dict[str, Any]:
    tokens, ends = rows.corpus.tokens, rows.corpus.ends
    digest = hashlib.sha256()
    for k in range(_PIECES):
        start, end = k * len(tokens) // _PIECES, k * len(ends) // _PIECES
        digest.update(tokens[start : min(start + _TOKENS, len(tokens))].tobytes())
        digest.update(ends[end : end + _TOKENS].tobytes())
    counts = {"tokens": len(tokens), "documents": len(ends), "rows": rows.count, "held_out_rows": rows.held_out_count}
    return {**counts, "sample": digest.hexdigest()[:16]}


def _same_data(own: dict[str, Any], was: dict[str, Any]) -> list[str]:
    changed = {name: was.get(name) for name in own if was.get(name) != own[name]}
    if changed.keys() == {"sample"}:
        return [f"data: as many tokens, {own['tokens']:,}, but others"]
    return [f"data: {name.replace('_', ' ')} was {before}, is {own[name]}"
            for name, before in changed.items() if name != "sample"]


def _model(own: dict[str, Any], was: dict[str, Any]) -> list[str]:
    if was.get("version") != own["version"]:
        return [f"the model is in format {was.get('version')}, this version has {own['version']}"]
    found = _fields("model", own["model"], was["model"]) + _fields("mtp", own["mtp"], was["mtp"])
    mine, theirs = _nodes(own), _nodes(was)
    found += [f"`{path}` is no layer of the save" for path in mine if path not in theirs]
    found += [f"`{path}` is a layer of the save only" for path in theirs if path not in mine]
    for path in mine:
        if path in theirs:
            found += _fields(f"`{path}`", mine[path], theirs[path])
    return found


def _nodes(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> what the node computes: its names, cuts, `recompute` and what balances experts are left out."""
    layers, found = _layers(data), {}
    for node in data["nodes"]:
        found[node["path"]] = own = {"weights": node["owner"]}
        if (spec := layers.get(node["path"])) is not None:
            own |= {k: v for k, v in spec["sub"].items() if k != "recompute"}
            own |= {f"branch {i}": _computed(branch) for i, branch in enumerate(spec["branches"])}
            own["kind"] = "+".join(branch["kind"] for branch in spec["branches"])
    return found


def _layers(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {n["path"]: data["layers"][n["layer"]] for n in data["nodes"] if n["layer"] is not None}


def _computed(branch: dict[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in branch["fields"].items() if k not in BALANCE}
    return {**{k: v for k, v in branch.items() if k != "name"}, "fields": fields}


def _fields(where: str, own: Any, was: Any) -> list[str]:
    """The innermost fields that differ."""
    if own == was:
        return []
    if not (isinstance(own, dict) and isinstance(was, dict)):
        return [f"{where} was {was}, is {own}"]
    if own.get("kind") != was.get("kind"):
        return [f"{where} was {was.get('kind')}, is {own.get('kind')}"]
    inner = {"fields": "", "branch": "", "branch 0": ""}
    return [line for name in {**was, **own}
            for line in _fields(" ".join(filter(None, (where, inner.get(name, name)))), own.get(name), was.get(name))]
