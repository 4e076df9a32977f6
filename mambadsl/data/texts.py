"""Text out of files, piece by piece: memory does not grow with the file.

ValueError, with the file and the byte or the line, for what is no UTF-8 text and no JSON line with the field.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from mambadsl.text.spell import nearest

_BYTES = 1 << 18


def pieces_of(path: Path) -> Iterator[str]:
    """A file's text, some hundred thousand characters at a time; joined, they are its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file:
        while True:
            read = file.read(_BYTES)
            begun = len(decoder.getstate()[0])
            try:
                text = decoder.decode(read, final=not read)
            except UnicodeDecodeError as error:
                at = done - begun + error.start
                raise ValueError(f"`{path}` is no UTF-8 text: {_bad(error)} at offset {at}") from None
            if text:
                yield text
            if not read:
                return
            done += len(read)


def check(path: Path) -> bool:
    """True for a file of UTF-8 text."""
    for _ in pieces_of(path):
        pass
    return True


def json_texts(path: Path, *, field: str) -> Iterator[str]:
    """The texts of JSON lines; a line of white space alone is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _text(line.rstrip(), field)
                except ValueError as error:
                    raise ValueError(f"`{path}`, line {number}: {error}") from None


def _text(line: bytes, field: str) -> str:
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text: {_bad(error)}, {error.start} bytes into the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"an object is expected, not {json.dumps(found)[:40]}")
    if field not in found:
        near = nearest(field, found)
        has = f"it has {', '.join(f'`{name}`' for name in list(found)[:8])}" if found else "it is empty"
        raise ValueError(f"there is no field `{field}`; " + (f"did you mean `{near}`?" if near else has))
    text = found[field]
    if not isinstance(text, str):
        raise ValueError(f"`{field}` must be text, not {json.dumps(text)[:40]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"`{field}` has half a character, {text[error.start]!r}") from None
    return text


def _bad(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x}"
