"""Tensors of Megatron's ranks to weights of ours and back: the same bits, joined or cut as tensor parallelism has them.

A tensor that holds several logical parts one below the other (in_proj [z | x | B | C | dt], gate and up) is cut part by
part, so a rank has its share of each; attention's query groups lie one after the other and are cut between them.
In memory is one weight when importing, one pipeline segment when exporting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from mambadsl.adapt.files import E613, Files, hold, refuse
from mambadsl.adapt.tensors import Experts, Rows
from mambadsl.build.checkpoint import LISTED, listed
from mambadsl.build.shards import MAX_FILE_BYTES, Unit, blank, save_shards
from mambadsl.graph.weights import all_weights
from mambadsl.kinds.kind import Weight
from mambadsl.megatron.checkpoint import LATEST, Checkpoint, layer_of, local, save
from mambadsl.megatron.exporter import Exported
from mambadsl.megatron.importer import OUTSIDE, Imported
from mambadsl.megatron.pattern import stages
from mambadsl.text.diagnostic import Diagnostic, MdlError

#: How ranks share tensors, by words of tables of weights, or of tensors that have their own way.
WAYS = {"none": "whole", "out": "rows", "heads": "rows", "in": "columns"}
OWN = {
    ".experts.linear_fc1.": "rows", ".experts.linear_fc2.": "columns", ".eh_proj.": "rows",
    ".linear_q_down_proj.": "whole", ".linear_kv_down_proj.": "whole",
}


@dataclass(frozen=True)
class Share:
    """How a tensor is cut: "whole" (each rank has it), "rows" or "columns". parts: rows of each logical part."""

    way: str
    parts: tuple[int, ...] = ()

    def cut(self, tensor: Tensor, ranks: int) -> list[Tensor]:
        if self.way == "whole":
            return [tensor] * ranks
        if self.way == "columns":
            return list(tensor.chunk(ranks, 1))
        parts = [part.chunk(ranks) for part in tensor.split(list(self.parts))]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        if self.way == "whole" or len(shards) == 1:
            return shards[0]
        if self.way == "columns":
            return torch.cat(list(shards), 1)
        split = [shard.split([n // len(shards) for n in self.parts]) for shard in shards]
        return torch.cat([part for parts in zip(*split, strict=True) for part in parts])

    def shape(self, whole: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """Of one shard. Raises ValueError where the ranks cannot share alike."""
        if self.way == "whole":
            return whole
        if any(n % ranks for n in (self.parts if self.way == "rows" else whole[1:2])):
            raise ValueError(f"{list(whole)} cannot be shared by {ranks} ranks")
        if self.way == "columns":
            return (whole[0], whole[1] // ranks, *whole[2:])
        return (whole[0] // ranks, *whole[1:])


def shares(rows: Rows, weight: Weight) -> dict[str, Share]:
    """Of each tensor that holds the weight."""
    sizes = dict(weight.segments)
    shapes, found = dict(rows.shapes(weight)), {}
    for piece, segments in rows.held(weight):
        names = [piece.name.format(i) for i in range(rows.count)] if isinstance(rows, Experts) else [piece.name]
        way = next((own for part, own in OWN.items() if part in names[0]), WAYS.get(weight.tp))
        mixed = piece.groups > 1 or not segments
        for name in names:
            parts = (shapes[name][0],) if mixed else tuple(sizes[s] for s in segments)
            found[name] = Share(way, parts if way == "rows" else ())
    return found


class Source:
    """Weights of ours out of a checkpoint, checked to fit."""

    def __init__(self, imported: Imported, folder: str | Path):
        self.imported, self.checkpoint = imported, Checkpoint(folder)
        self.weights = all_weights(imported.graph)
        self.checkpoint.number(self._stages())
        self.shares = {path: shares(rows, self.weights[path]) for path, rows in imported.places.items()}
        self._of = {name: share for found in self.shares.values() for name, share in found.items()}
        self._check()

    def read(self, path: str) -> Tensor:
        return self.imported.places[path].read(self._get, self.weights[path])

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Writes them under our names."""
        units = []
        for path, weight in self.weights.items():
            first = self.checkpoint.shards[next(self.imported.places[path].names())][0]
            held = blank(weight.shape, first.dtype)
            units.append(Unit({path: held}, partial(self._made, path)))
        about = {"format": "pt", "model": self.imported.graph.name}
        return save_shards(
            Path(folder), "weights", units, index="weights.index.json", about=about, max_file_bytes=MAX_FILE_BYTES
        )

    def _made(self, path: str) -> list[tuple[str, Iterator[Tensor]]]:
        return [(path, self.imported.places[path].parts(self._get, self.weights[path]))]

    def _get(self, name: str) -> Tensor:
        found, share = self.checkpoint.shards[name], self._of[name]
        if share.way == "whole" and any(not torch.equal(found[0], other) for other in found[1:]):
            raise refuse(f"`{name}` is not the same on all tensor ranks, as it must be")
        return share.join(found)

    def _stages(self) -> tuple[int, ...]:
        counts = self.imported.stages
        if self.checkpoint.segments in (len(counts), 1):
            return counts if len(counts) == self.checkpoint.segments else (sum(counts),)
        if len(counts) > 1:
            there = f"`{self.checkpoint.folder}` has {self.checkpoint.segments} pipeline segments"
            raise refuse(f"{there}, the pattern {len(counts)}")
        return stages(self.imported.pattern, self.checkpoint.segments)

    def _check(self) -> None:
        shards, tp = self.checkpoint.shards, self.checkpoint.tp
        wanted: dict[str, tuple[int, ...]] = {}
        for path, rows in self.imported.places.items():
            wanted |= dict(rows.shapes(self.weights[path]))
        try:
            shapes = {name: self._of[name].shape(shape, tp) for name, shape in wanted.items()}
        except ValueError as error:
            raise refuse(str(error)) from None
        tied = {OUTSIDE["head.weight"]} if self.imported.graph.tied else set()
        missing = [name for name in shapes if name not in shards]
        unknown = [name for name in shards if name not in shapes and name not in tied]
        bent = [n for n in shapes if n in shards and any(tuple(t.shape) != shapes[n] for t in shards[n])]
        if not (missing or unknown or bent):
            return
        facts = [*listed("missing", missing, unknown), *listed("nobody takes", unknown, missing)]
        facts += [
            f"shape of `{name}`: {list(shards[name][0].shape)} there, {list(shapes[name])} by the arguments"
            for name in bent[:LISTED]
        ]
        message = f"the tensors in `{self.checkpoint.folder}` do not fit the arguments"
        raise MdlError([Diagnostic(E613, message, notes=tuple(facts))])


def export_weights(exported: Exported, weights: str | Path, folder: str | Path, *, tp: int) -> tuple[Path, ...]:
    """A folder of ours as a checkpoint, a file for each rank. Raises MdlError (E613)."""
    imported, files, folder = exported.imported, Files(weights), Path(folder)
    table = all_weights(imported.graph)
    hold(files, table)
    for path, weight in table.items():
        whole = dict(imported.places[path].shapes(weight))
        for name, share in shares(imported.places[path], weight).items():
            try:
                share.shape(whole[name], tp)
            except ValueError as error:
                raise refuse(f"`{path}`: {error}") from None
    starts = [0, *accumulate(imported.stages)]
    last, written = len(imported.stages) - 1, []
    for segment in range(last + 1):
        ranks: list[dict[str, Tensor]] = [{} for _ in range(tp)]
        for path, name in _held(imported, segment):
            for theirs, tensor in imported.places[path].write(files.get(path), table[path]):
                share = shares(imported.places[path], table[path])[theirs]
                for rank, shard in zip(ranks, share.cut(tensor, tp), strict=True):
                    rank[local(name or theirs, starts[segment])] = shard.clone()
        for rank, model in enumerate(ranks):
            at = f"mp_rank_{rank:02d}" + (f"_{segment:03d}" if last else "")
            written.append(save(folder, at, model, exported.arguments))
    (folder / LATEST).write_text("release\n", encoding="utf-8")
    return (*written, folder / LATEST)


def _held(imported: Imported, segment: int) -> Iterator[tuple[str, str]]:
    """Paths of ours in a segment, and their tensor's name where it is another than the table's: a tied head is there
    again if the embedding is far."""
    starts, last = [0, *accumulate(imported.stages)], len(imported.stages) - 1
    for path, rows in imported.places.items():
        layer = layer_of(next(rows.names()))
        if layer is not None:
            if starts[segment] <= layer < starts[segment + 1]:
                yield path, ""
        elif segment == (0 if path == "embed.weight" else last):
            yield path, ""
    if last and segment == last:
        if imported.graph.tied:
            yield "embed.weight", OUTSIDE["head.weight"]
        if imported.graph.mtp:
            yield "embed.weight", ""
