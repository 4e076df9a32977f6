"""Paths as given -> the files to read, one by one.

A folder stands for all files below it, in the order of their names, without hidden ones. A pair of `NAME.bin` and
`NAME.idx` may be called by either name, by both, or `NAME`. ValueError for what is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mambadsl.data.cache import with_suffix
from mambadsl.text.spell import nearest


def files(paths: Sequence[Path], *, cache: Path) -> list[Path]:
    """The files below `paths`, of which the folder `cache` is none."""
    for path in paths:
        apart(path, cache, "cache")
    found = [file for path in paths for file in _below(path)]
    if not found:
        raise ValueError("there is no data: not one path is given")
    there = set(found)
    # An index is read with its ids, which are in the list where both are named.
    return [file for file in found if not (file.suffix == ".idx" and file.with_suffix(".bin") in there)]


def apart(path: Path, other: Path, what: str) -> None:
    """ValueError for data among which a folder lies that is written."""
    folder, inner = path.resolve(), other.resolve()
    if path.is_dir() and inner.is_relative_to(folder) and not _hidden(inner.relative_to(folder)):
        raise ValueError(f"the {what} `{other}` lies in `{path}`, which is read as data: give another folder")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        inside = sorted((p.relative_to(path) for p in path.rglob("*")), key=lambda p: p.parts)
        shown = [path / p for p in inside if not _hidden(p)]
        found = [p for p in shown if p.is_file()]
        if not found:
            raise ValueError(f"the folder `{path}` has no file of data")
        yield from found
    elif path.is_file():
        yield path
    elif with_suffix(path, ".idx").is_file():
        yield with_suffix(path, ".idx")
    elif path.exists():
        raise ValueError(f"`{path}` is neither a file nor a folder")
    else:
        folder = path.parent
        near = nearest(path.name, [p.name for p in sorted(folder.iterdir())]) if folder.is_dir() else None
        hint = f"; did you mean `{folder / near}`?" if near else ""
        raise ValueError(f"there is no file or folder `{path}`{hint}")
