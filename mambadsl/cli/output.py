"""What commands print: text or one JSON object on standard output, problems on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mambadsl.text.diagnostic import Diagnostic


def harden() -> None:
    """Text that the terminal cannot show is escaped, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def text(words: str) -> None:
    click.echo(words, nl=not words.endswith("\n"))


def json(*, ok: bool = True, **data: Any) -> None:
    from json import dumps

    click.echo(dumps({"ok": ok, **data}, indent=1, ensure_ascii=False, allow_nan=False))


def problems(diagnostics: Iterable[Diagnostic]) -> None:
    """As text, on standard error."""
    from mambadsl.text.render import to_text

    color = colored(sys.stderr)
    for diagnostic in diagnostics:
        click.echo(to_text(diagnostic, color=color) + "\n", err=True, color=color)


def failed(diagnostics: Iterable[Diagnostic], *, as_json: bool) -> None:
    if as_json:
        json(ok=False, diagnostics=plain(diagnostics))
    else:
        problems(diagnostics)


def refused(message: str) -> None:
    """What is neither a diagnostic nor bad usage, as JSON."""
    json(ok=False, diagnostics=[], error=message)


def plain(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    from mambadsl.text.render import to_json

    return [to_json(diagnostic) for diagnostic in diagnostics]


def note(words: str) -> None:
    """A remark beside the result."""
    click.echo(f"mambadsl: {words}", err=True)


def bug(error: Exception) -> None:
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    note(f"this is a bug: {what}")
    click.echo("Please report it with the command and the file; MAMBADSL_DEBUG=1 shows where it happened.", err=True)


def colored(stream: Any) -> bool:
    """NO_COLOR and FORCE_COLOR decide, else whether it is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def write(path: Path, words: str) -> None:
    """The whole file or nothing: beside it first, then in its place, with the mode it had. A link stays one."""
    data = words.encode("utf-8")
    try:
        # Asked of the path as given: a pipe behind /dev/stdout has no other name.
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(path.resolve(), data)
    except OSError as error:
        raise click.ClickException(f"`{path}` cannot be written: {error.strerror or error}") from None


def _replace(target: Path, data: bytes) -> None:
    import stat
    import tempfile

    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
