"""A file's text and places in it.

In: a path or a string. Out: `Source`, and `Span`s that point into it. Refuses (as `MdlError`) what
is not a text file of sensible size; nothing later has to think about bytes again.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mambadsl.text.diagnostic import Diagnostic, MdlError, declare

MAX_BYTES = 256 * 1024

E001 = declare(
    "E001",
    "the file cannot be read",
    """
    The path does not exist, is a folder, or may not be opened. The message says which, and names
    the files nearby that have a similar name.
    """,
)
E002 = declare(
    "E002",
    "the file is too large",
    f"""
    A model file is at most {MAX_BYTES // 1024} KiB. The largest published model needs about 2 KiB: repeats
    (`[M F]*24`) keep files short. A file over the limit is nearly always another file by mistake.
    """,
)
E003 = declare(
    "E003",
    "the file is not UTF-8 text",
    """
    Model files are UTF-8 text. A byte that is not (or a NUL) means a binary file, UTF-16, or a
    damaged one. Save the file as UTF-8 and try again.
    """,
)


@dataclass(frozen=True, eq=False)
class Source:
    """Text with a name. `path` is None for text that came from a string (`-e`, the Python API)."""

    name: str
    text: str
    path: Path | None = None

    @cached_property
    def line_starts(self) -> tuple[int, ...]:
        starts = [0]
        find, at = self.text.find, 0
        while (at := find("\n", at)) >= 0:
            at += 1
            starts.append(at)
        return tuple(starts)

    def line_col(self, offset: int) -> tuple[int, int]:
        """1-based line and column (in characters) of an offset."""
        line = bisect_right(self.line_starts, offset)
        return line, offset - self.line_starts[line - 1] + 1

    def line_text(self, line: int) -> str:
        start = self.line_starts[line - 1]
        end = self.line_starts[line] - 1 if line < len(self.line_starts) else len(self.text)
        return self.text[start:end]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` (exclusive) of a source."""

    source: Source = field(repr=False)
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.line_col(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.line_col(self.start)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def to(self, other: Span) -> Span:
        """From the start of this span to the end of `other` (same source)."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"


def from_text(text: str, *, name: str = "<text>", path: Path | None = None) -> Source:
    """A Source from a string: drops a byte-order mark, turns CRLF and CR into LF, refuses NUL."""
    if len(text) > MAX_BYTES:
        raise MdlError([_too_large(name, len(text))])
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    source = Source(name, text, path)
    if (at := text.find("\0")) >= 0:
        raise MdlError([Diagnostic(E003, "a NUL character is not text", Span(source, at, at + 1))])
    return source


def read(path: str | Path, *, name: str | None = None) -> Source:
    """Opens a model file. `name` is what messages call it (default: the path as given)."""
    from mambadsl.text.spell import nearest

    path = Path(path)
    name = name or str(path)
    try:
        if path.is_dir():
            raise MdlError([Diagnostic(E001, f"`{name}` is a folder, not a model file")])
        if not path.is_file() and path.exists():
            raise MdlError([Diagnostic(E001, f"`{name}` is not a regular file")])
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent
        siblings = [p.name for p in sorted(folder.glob("*.mdl"))] if folder.is_dir() else []
        near = nearest(path.name, siblings)
        help = (f"did you mean `{folder / near}`?",) if near else ()
        raise MdlError([Diagnostic(E001, f"there is no file `{name}`", help=help)]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MdlError([Diagnostic(E001, f"`{name}` cannot be read: {reason}")]) from None
    if len(data) > MAX_BYTES:
        raise MdlError([_too_large(name, path.stat().st_size)])
    return from_bytes(data, name=name, path=path)


def from_bytes(data: bytes, *, name: str, path: Path | None = None) -> Source:
    """A Source from UTF-8 bytes, of a file or of standard input. E002 and E003."""
    if len(data) > MAX_BYTES:
        raise MdlError([_too_large(name, len(data))])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{data[error.start]:02x} in line {line} of `{name}` is not UTF-8 text"
        raise MdlError([Diagnostic(E003, message)]) from None
    return from_text(text, name=name, path=path)


def _too_large(name: str, size: int) -> Diagnostic:
    return Diagnostic(
        E002, f"`{name}` has {size:,} bytes; a model file has at most {MAX_BYTES:,}",
        help=("repeats keep a file short: `[M F]*24`",),
    )
