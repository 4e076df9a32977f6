"""Tensors to safetensors files of a limited size, one after the other.

A folder gets `STEM.safetensors`, or `STEM-00001-of-00003.safetensors`, ... and an index. Files appear complete or not
at all; earlier ones of the same stem go last. The format (a header of JSON, then the tensors' bytes without gaps) is
written here, for the library wants all tensors of a file at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: A file is at most this large, unless one unit alone is larger.
MAX_FILE_BYTES = 4 * 2**30
#: Handed to the system at once. For large writes Linux looks for large pages to cache them in, which takes longer than
#: to copy them.
CHUNK = 2**17
#: By safetensors' names, in the order in which it lays them out from the last to the first, so that all are aligned.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: -i for i, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together. held: the shape and dtype of each (a tensor on any device has both). make: of
    each, what holds its rows, one below the other."""

    held: Mapping[str, Tensor]
    make: Callable[[], Iterable[tuple[str, Iterable[Tensor]]]]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.held.values())


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Shape and dtype alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def save_shards(
    folder: Path, stem: str, units: Sequence[Unit], *, index: str, about: dict[str, str],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> tuple[Path, ...]:
    """Writes the units in their order and returns the files. index: the name of the list of what lies where."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(units, max_file_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    written = [*names, index] if len(shards) > 1 else names
    try:
        _write(folder, dict(zip(names, shards)), index if len(shards) > 1 else None, about)
    except BaseException:
        for name in written:
            (folder / f"{name}.part").unlink(missing_ok=True)
        raise
    # New files first: a crash here leaves old and new side by side, which loading refuses.
    for name in written:
        os.replace(folder / f"{name}.part", folder / name)
    for old in own_files(folder, stem, index):
        if old.name not in written:
            old.unlink()
    return tuple(folder / name for name in names)


def _write(folder: Path, shards: dict[str, list[Unit]], index: str | None, about: dict[str, str]) -> None:
    for name, shard in shards.items():
        header, starts = _header(shard, about)
        with (folder / f"{name}.part").open("wb", buffering=0) as file:
            _put(file.fileno(), header, 0)
            for unit in shard:
                _fill(file.fileno(), unit, starts)
    if index:
        units = [(name, unit) for name, shard in shards.items() for unit in shard]
        places = {path: name for name, unit in units for path in unit.held}
        table = {"metadata": {"total_size": sum(unit.bytes for _, unit in units)}, "weight_map": places}
        (folder / f"{index}.part").write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")


def _fill(file: int, unit: Unit, starts: Mapping[str, int]) -> None:
    left = dict(unit.held)
    for path, parts in unit.make():
        held, at = left.pop(path), starts[path]
        for part in parts:
            if part.dtype != held.dtype:
                raise ValueError(f"`{path}` was made of {part.dtype} where {held.dtype} was to be")
            at += _put(file, _bytes(part), at)
        if at != starts[path] + held.nbytes:
            raise ValueError(f"`{path}` was made of {at - starts[path]} bytes where {held.nbytes} were to be")
    if left:
        raise ValueError(f"not made: {', '.join(left)}")


def _header(shard: Sequence[Unit], about: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """As the library has it, and where in the file each tensor begins."""
    held = {path: t for unit in shard for path, t in unit.held.items()}
    at, table, starts = 0, {"__metadata__": about}, {}
    for path, t in sorted(held.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])):
        starts[path], at = at, at + t.nbytes
        table[path] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [starts[path], at]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {path: len(header) + start for path, start in starts.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _put(file: int, data: bytes | memoryview, at: int) -> int:
    """How many bytes."""
    left = memoryview(data)
    while left:
        done = os.pwrite(file, left[:CHUNK], at)
        left, at = left[done:], at + done
    return len(data)


def own_files(folder: Path, stem: str, index: str) -> list[Path]:
    """What an earlier save of this stem may have left."""
    shards = [f for f in folder.glob(f"{stem}-*-of-*.safetensors") if f.name[len(stem) + 1].isdigit()]
    return shards + [file for file in (folder / f"{stem}.safetensors", folder / index) if file.exists()]


def _shards(units: Sequence[Unit], max_file_bytes: int) -> list[list[Unit]]:
    shards: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and size + unit.bytes > max_file_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.bytes
    return shards
