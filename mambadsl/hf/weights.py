"""Tensors of Hugging Face's to weights of ours and back: the same bits in another order, a weight at a time.

In memory is no more than one tensor, and what the system keeps of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from mambadsl.adapt.files import E613, Files, hold
from mambadsl.adapt.tensors import Rows
from mambadsl.build.checkpoint import LISTED, listed
from mambadsl.build.init import draw
from mambadsl.build.shards import MAX_FILE_BYTES, Unit, blank, save_shards
from mambadsl.graph.weights import all_weights
from mambadsl.hf.importer import Imported
from mambadsl.kinds.kind import Weight
from mambadsl.text.diagnostic import Diagnostic, MdlError

#: What any family may have saved: tables of rotations, and indices of their positions.
EMPTY = "*rotary_emb.inv_freq", "*rope_freqs", "*.position_ids"

#: Where the text model of a larger one lies, and what lies around it.
INSIDE = {"model.": "model.language_model."}
AROUND = "model.visual.*", "model.vision*", "model.multi_modal_projector.*", "visual.*"


class Source:
    """Weights of ours out of a folder of theirs, checked to fit. skipped: tensors that hold nothing a model needs.
    renamed: our table's names -> what the folder calls them. shapes: of tensors that are cut otherwise than tables
    say. together: weights of ours that are one tensor there, where tables say several -> its name."""

    def __init__(self, imported: Imported, folder: str | Path):
        self.imported, self.files = imported, Files(folder)
        self.weights = all_weights(imported.graph)
        self.places = dict(imported.places)
        self.together: dict[str, str] = {}
        self.renamed: dict[str, str] = {}
        self.constants: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.skipped: tuple[str, ...] = ()
        self._check()

    def read(self, path: str) -> Tensor:
        if path in self.constants:
            return draw(self.weights[path], self.imported.graph, path=path, seed=0)
        return self.places[path].read(self._get, self.weights[path])

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Writes them under our names, in the order of their files."""
        order = {file: i for i, file in enumerate(self.files.sizes)}
        first = {path: self._name(next(rows.names())) for path, rows in self.places.items()}
        file_of = self.files.file_of
        units = [
            self._unit(path)
            for path in sorted(self.weights, key=lambda path: order.get(file_of.get(first[path]), 0))
        ]
        about = {"format": "pt", "model": self.imported.graph.name}
        most = min(MAX_FILE_BYTES, max(self.files.sizes.values()))
        return save_shards(
            Path(folder), "weights", units, index="weights.index.json", about=about, max_file_bytes=most
        )

    def _unit(self, path: str) -> Unit:
        weight, rows = self.weights[path], self.places[path]
        if path in self.constants:
            drawn = self.read(path)
            return Unit({path: drawn}, lambda: [(path, [drawn])])
        dtype = reduce(torch.promote_types, (self.files.dtypes[self._name(name)] for name in rows.names()))
        return Unit(
            {path: blank(weight.shape, dtype)},
            lambda: [(path, (part.to(dtype) for part in rows.parts(self._get, weight)))],
        )

    def _name(self, name: str) -> str:
        return self.renamed.get(name, name)

    def _get(self, name: str) -> Tensor:
        return self.files.get(self._name(name))

    def _check(self) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        self._find_together()
        for path, rows in self.places.items():
            wanted |= dict(rows.shapes(self.weights[path]))
        there = self.files.shapes
        for name in wanted:
            if name not in there:
                self._find_renamed(name, wanted)
        absent = {name for name in wanted if self._name(name) not in there}
        self.constants = {
            path for path, rows in self.places.items() if rows.constant and absent.issuperset(rows.names())
        }
        given = {name for path in self.constants for name in self.places[path].names()}
        missing = [name for name in wanted if name in absent and name not in given]
        used = {self._name(name) for name in wanted}
        shapes = {name: there[self._name(name)] for name in wanted if name not in absent}
        left = [name for name in there if name not in used]
        self.skipped = tuple(name for name in left if self._empty(name))
        unknown = [name for name in left if name not in self.skipped]
        bent = [
            name for path, rows in self.places.items()
            if all(n in shapes for n in rows.names()) and not rows.fits(self.weights[path], shapes)
            for name in rows.names() if shapes[name] != wanted[name]
        ]
        self.shapes = {self._name(n): shape for n, shape in shapes.items() if shape != wanted[n]}
        if not (missing or unknown or bent):
            return
        facts = [*listed("missing", missing, unknown), *listed("nobody takes", unknown, missing)]
        facts += [
            f"shape of `{self._name(name)}`: {list(there[self._name(name)])} in the folder, "
            f"{list(wanted[name])} by the configuration" for name in bent[:LISTED]
        ]
        counts = {"missing": missing, "that no layer takes": unknown, "of another shape": bent}
        summary = ", ".join(f"{len(found)} {what}" for what, found in counts.items() if found)
        message = f"the tensors in `{self.files.folder}` do not fit the configuration: {summary}"
        raise MdlError([Diagnostic(E613, message, notes=tuple(facts))])

    def _find_together(self) -> None:
        for path, rows in self.places.items():
            if rows.together and any(n in self.files.shapes for n in (rows.together, *self._renamed(rows.together))):
                self.together[path] = rows.together
        self.places |= {path: Rows(name) for path, name in self.together.items()}

    def _find_renamed(self, name: str, wanted: Mapping[str, object]) -> None:
        for other in self._renamed(name):
            if other in self.files.shapes and other not in wanted:
                self.renamed[name] = other

    def _renamed(self, name: str) -> list[str]:
        """What else a folder may call it."""
        renamed = {**self.imported.family.renamed, **(INSIDE if self.imported.inside else {})}
        return [name.replace(ours, theirs) for ours, theirs in renamed.items()]

    def _empty(self, name: str) -> bool:
        family, graph = self.imported.family, self.imported.graph
        patterns = (*EMPTY, *family.empty, *(AROUND if self.imported.inside else ()))
        if family.tail is not None and graph.mtp is None:
            patterns += family.tail.empty
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return True
        # A tied head may have been saved beside the table that it is, and both again by what predicts further tokens.
        head = family.embed if graph.tied else family.head
        copies = {family.head: head} if graph.tied else {}
        if graph.mtp is not None:
            copies |= dict.fromkeys((".embed_tokens.weight", ".word_embeddings.weight"), family.embed)
            copies |= dict.fromkeys((".shared_head.head.weight", ".lm_head.weight"), head)
        return any(name.endswith(end) and self._equal(name, self._name(of)) for end, of in copies.items())

    def _equal(self, name: str, other: str) -> bool:
        shapes = self.files.shapes
        return shapes[name] == shapes.get(other) and torch.equal(self.files.get(name), self.files.get(other))


def export_units(
    places: Mapping[str, Rows], weights: Mapping[str, Weight], files: Files, renamed: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]], together: Mapping[str, str] = {},
) -> Iterator[Unit]:
    """Weights of ours in a folder, as tensors of theirs. renamed, shapes, together: as `Source` found them. Raises
    MdlError (E613) where they do not fit."""
    hold(files, weights)
    places = {**places, **{path: Rows(name) for path, name in together.items()}}
    for path, weight in weights.items():
        written = places[path].written(weight, shapes)
        held = {renamed.get(name, name): blank(shape, files.dtypes[path]) for name, shape in written}
        yield Unit(held, partial(_written, places[path], weight, files, path, renamed, shapes))


def _written(
    rows: Rows, weight: Weight, files: Files, path: str, renamed: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, list[Tensor]]]:
    for name, tensor in rows.write(files.get(path), weight, shapes):
        yield renamed.get(name, name), [tensor]
