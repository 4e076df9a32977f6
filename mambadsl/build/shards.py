"""Tensors to safetensors files of a limited size, one file in memory at a time.

A folder gets `STEM.safetensors`, or `STEM-00001-of-00003.safetensors`, ... and an index. Files appear complete or not
at all; earlier ones of the same stem go last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

#: A file is at most this large, unless one unit alone is larger.
MAX_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together. bytes: of all of them."""

    bytes: int
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]


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
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    for name, shard in shards.items():
        kept = {path: t.detach().contiguous().cpu() for unit in shard for path, t in unit.tensors()}
        save_file(kept, folder / f"{name}.part", metadata=about)
        places |= dict.fromkeys(kept, name)
        del kept
    if index:
        size = sum(unit.bytes for shard in shards.values() for unit in shard)
        table = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / f"{index}.part").write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")


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
