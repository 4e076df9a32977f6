"""What is computed once from a file and kept beside others of its sort: a folder that may be deleted at any time.

A thing is written by one process, while others on the machine wait; it is there complete or not at all, whenever the
writer is killed. Its name comes from what it was made of, so that changed files and tokenizers make new things.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

#: Part of every name; another number where what is written changes.
_FORM = 1
#: Files below this many bytes are looked through each time: that takes less than to remember what was seen.
_REMEMBERED = 1 << 24


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was opened."""

    path: Path
    bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        path = path.resolve()
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)

    def hold(self) -> None:
        """ValueError if the file is another one by now."""
        if Stamp.of(self.path) != self:
            raise ValueError(f"`{self.path}` was changed while it was read")


@dataclass(frozen=True)
class Cache:
    folder: Path

    def made(self, stamp: Stamp, *how: str, last: str, make: Callable[[Path], None]) -> Path:
        """The path, without suffix, of what `make(path)` writes from a file; it writes the suffix `last` last."""
        name = hashlib.sha256(repr((_FORM, str(stamp.path), stamp.bytes, stamp.changed_ns, how)).encode())
        path = self.folder / name.hexdigest()[:40]
        if not with_suffix(path, last).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            from filelock import FileLock

            with FileLock(with_suffix(path, ".lock")):
                if not with_suffix(path, last).exists():
                    make(path)
        return path

    def fact(self, stamp: Stamp, *how: str, find: Callable[[], Any]) -> Any:
        """What `find` says about a file (as JSON); remembered if the file is large. What it raises is not."""
        if stamp.bytes < _REMEMBERED:
            return find()

        def make(path: Path) -> None:
            found = find()
            stamp.hold()
            with whole(with_suffix(path, ".json")) as out:
                out.write(json.dumps(found).encode())

        return json.loads(with_suffix(self.made(stamp, *how, last=".json", make=make), ".json").read_bytes())


def usual_folder() -> Path:
    """`mambadsl` in the user's folder of caches."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mambadsl"


def with_suffix(path: Path, suffix: str) -> Path:
    """The suffix added: a name's own dots stay."""
    return path.with_name(path.name + suffix)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is complete and on the disk."""
    part = with_suffix(path, ".part")
    try:
        with part.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
