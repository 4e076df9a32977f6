"""Weights on disk: safetensors files under the model's own paths, whole or by stage, loaded strictly.

A folder holds `weights.safetensors`, or `weights-00001-of-00003.safetensors`, ... with `weights.index.json`.
A stage writes `weights-stage-1-of-4...` instead, so that the stages of a pipeline share a folder, and any
split reads what any other wrote. Refuses (E905) names that are missing, unknown or of another shape,
files that an index names and the folder lacks, and one name with two different values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambadsl.build.model import Model
from mambadsl.build.shards import MAX_FILE_BYTES, Unit, save_shards
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.weights import all_weights
from mambadsl.kinds.kind import Weight
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.spell import nearest

E905 = declare(
    "E905",
    "the weights in the folder do not fit the model",
    """
    Loading is strict: every weight of the model must be in the folder with its shape, and the folder may
    hold nothing that the model does not know. Names are paths (`stack.3.mixer.in_proj.weight`), so a
    missing and an unknown name next to each other mean another pattern, another kind, or another
    spelling. A single stage takes its own weights and leaves the rest of the model's.
    """,
)

#: Names that are told.
LISTED = 12


def save_weights(
    model: Model, folder: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[Path, ...]:
    """Writes the model's weights and returns the files. Earlier weights of the same stem go; files appear
    complete or not at all."""
    stem = _stem(model)
    units = [Unit({path: t}, partial(_one, path, t)) for path, t in model.tensors().items()]
    about = {"format": "pt", "model": model.graph.name}
    return save_shards(
        Path(folder), stem, units, index=f"{stem}.index.json", about=about, max_file_bytes=max_file_bytes
    )


def _one(path: str, tensor: Tensor) -> list[tuple[str, list[Tensor]]]:
    return [(path, [tensor])]


def load_weights(model: Model, folder: str | Path, *, device: Any = "cpu") -> Model:
    """Fills the model (or stage) in place, in its own dtypes; a model on the meta device moves to `device`
    first. Raises MdlError (E905) before anything is changed."""
    folder = Path(folder)
    stored = _Stored(folder)
    if problem := _misfit(model.graph, model.weights, stored):
        raise MdlError([problem])
    if any(t.is_meta for t in model.tensors().values()):
        model.to_empty(device=device)
    tensors = model.tensors()
    with torch.no_grad():
        for path, value in stored.values(tuple(tensors)):
            tensors[path].copy_(value)
    return model


def stored_weights(graph: LayerGraph, folder: str | Path) -> _Stored:
    """The files of all the model's weights, none of which is read before it is asked for. Raises MdlError (E905)."""
    stored = _Stored(Path(folder))
    if problem := _misfit(graph, all_weights(graph), stored):
        raise MdlError([problem])
    return stored


class _Stored:
    """What the files of a folder hold: `shapes` by path, `files` by path."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder, self.shapes, self.files = folder, {}, {}
        if not folder.is_dir():
            raise _refuse(f"`{folder}` is a file; the folder it is in is needed" if folder.exists()
                          else f"there is no folder `{folder}`")
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise _refuse(f"there are no weights (`*.safetensors`) in `{folder}`")
        for index in sorted(folder.glob("*.index.json")):
            try:
                named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise _refuse(f"`{index}` is no index of weights: it has no `weight_map`") from None
            if lost := sorted(named - {file.name for file in found}):
                raise _refuse(f"`{folder}` lacks files that `{index.name}` names", notes=lost)
        for file in found:
            try:
                with safe_open(file, "pt") as opened:
                    held = {path: tuple(opened.get_slice(path).get_shape()) for path in opened.keys()}
            except SafetensorError as error:
                raise _refuse(f"`{file}` is damaged or not a safetensors file: {error}") from error
            for path, shape in held.items():
                self.shapes.setdefault(path, shape)
                self.files.setdefault(path, []).append(file)

    def values(self, paths: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for path in paths:
            by_file.setdefault(self.files[path][0], []).append(path)
        for file, held in by_file.items():
            with safe_open(file, "pt") as opened:
                for path in held:
                    yield path, opened.get_tensor(path)

    def value(self, path: str) -> Tensor:
        [(_, value)] = self.values((path,))
        return value

    def contradictions(self) -> Iterator[str]:
        """Names stored more than once (a tied embedding, shared layers) with values that differ."""
        from safetensors import safe_open

        for path, files in self.files.items():
            values = []
            for file in files if len(files) > 1 else ():
                with safe_open(file, "pt") as opened:
                    values.append(opened.get_tensor(path))
            if any(not torch.equal(values[0], other) for other in values[1:]):
                yield f"`{path}` differs between " + " and ".join(file.name for file in files)


def _misfit(graph: LayerGraph, weights: Mapping[str, Weight], stored: _Stored) -> Diagnostic | None:
    """One diagnostic that lists everything, or None. weights: those that are needed of the graph's."""
    known = {path: weight.shape for path, weight in all_weights(graph).items()}
    wanted = {path: tuple(weight.shape) for path, weight in weights.items()}
    missing = [path for path in wanted if path not in stored.shapes]
    unknown = [path for path in stored.shapes if path not in known]
    facts = [*listed("missing", missing, unknown), *listed("unknown", unknown, missing)]
    bent = [path for path in wanted if path in stored.shapes and stored.shapes[path] != wanted[path]]
    for path in bent[:LISTED]:
        shapes = f"{list(stored.shapes[path])} in the folder, {list(wanted[path])} in the model"
        facts.append(f"shape of `{path}`: {shapes}")
    if len(bent) > LISTED:
        facts.append(f"shape: and {len(bent) - LISTED} more")
    twice = list(stored.contradictions())
    facts += [f"twice: {fact}" for fact in twice]
    if not facts:
        return None
    counts = {"missing": missing, "unknown": unknown, "of another shape": bent}
    counts["stored twice, unequal"] = twice
    summary = ", ".join(f"{len(found)} {what}" for what, found in counts.items() if found)
    message = f"the weights in `{stored.folder}` do not fit `{graph.name}`: {summary}"
    return Diagnostic(E905, message, notes=tuple(facts))


def listed(what: str, names: Sequence[str], others: Iterable[str]) -> list[str]:
    """The first of them, each with what it may be instead."""
    facts = []
    for name in names[:LISTED]:
        near = nearest(name, others)
        facts.append(f"{what}: `{name}`" + (f", nearest: `{near}`" if near else ""))
    return facts + ([f"{what}: and {len(names) - LISTED} more"] if len(names) > LISTED else [])


def _refuse(message: str, *, notes: list[str] = ()) -> MdlError:
    return MdlError([Diagnostic(E905, message, notes=tuple(notes))])


def _stem(model: Model) -> str:
    stage = model.stage
    return "weights" if stage.count == 1 else f"weights-stage-{stage.index + 1}-of-{stage.count}"
