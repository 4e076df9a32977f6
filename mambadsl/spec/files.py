"""Imports: which file an import means, read once each, inside the project only."""

from __future__ import annotations

import os
from pathlib import Path

from mambadsl.files import MODELS
from mambadsl.syntax import tree
from mambadsl.syntax.read import read as read_tree
from mambadsl.text import source as sources
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import Source, Span
from mambadsl.text.spell import nearest

MAX_FILES = 64

E030 = declare(
    "E030",
    "an import cannot be followed",
    """
    `from "path.mdl" import A, M` reads another model file: a path relative to the importing file, or
    `std/NAME.mdl` for one of the shipped models. The file must exist and be a model file.
    """,
)
E031 = declare(
    "E031",
    "an import leaves the project",
    """
    Imports stay inside the project's folder: the nearest folder above the compiled file that has a
    `.git` or `pyproject.toml`, else the compiled file's own folder. Absolute paths and links that lead
    out are refused, so that compiling a file somebody sent never reads anything else of yours.
    """,
)
E032 = declare(
    "E032",
    "imports run in a circle",
    """
    A file imports itself, directly or through others. Move what both need into a third file that
    imports neither.
    """,
)
E033 = declare("E033", "too many imported files", f"At most {MAX_FILES} files take part in one model.")


class Files:
    """Reads model files by import, each once. `main` has been read already."""

    def __init__(self, main: tree.File):
        path = main.source.path
        self.main = main
        #: The folder that imports of a file stay in, by the file's source.
        self._roots: dict[Source, Path] = {main.source: _project_folder(path)} if path else {}
        self._read: dict[Path, tree.File] = {path.resolve(): main} if path else {}

    def std(self) -> tree.File:
        """The prelude: models/std.mdl."""
        return self._load(MODELS / "std.mdl", name="std.mdl", root=MODELS)

    def follow(self, statement: tree.Import, importer: tree.File) -> tree.File:
        """The file that an import names. Raises MdlError: places are the import, or inside that file."""
        text, span = statement.path.value, statement.path.span
        shipped = text.startswith("std/")
        root = MODELS if shipped else self._roots.get(importer.source)
        if root is None:
            raise MdlError([Diagnostic(
                E030, "text without a file has nothing to import from", span, "no folder to look in",
                help=("`std/...` files can be imported from anywhere",),
            )])
        folder = MODELS if shipped else importer.source.path.resolve().parent
        rest = text.removeprefix("std/") if shipped else text
        path = _resolved(folder / rest, text, span)
        if Path(rest).is_absolute() or not path.is_relative_to(root.resolve()):
            where = "the folder of shipped models" if shipped else f"the project's folder, {root}"
            raise MdlError([Diagnostic(
                E031, "an import stays inside the project's folder", span, f"this leads to {path}",
                notes=(f"imports from here stay in {where}",),
            )])
        if path.is_dir():
            raise MdlError([Diagnostic(E030, f"`{text}` is a folder, not a model file", span)])
        if not path.is_file():
            siblings = [p.name for p in path.parent.glob("*.mdl")] if path.parent.is_dir() else []
            near = nearest(path.name, siblings)
            help = (f'did you mean "{text.removesuffix(path.name)}{near}"?',) if near else ()
            raise MdlError([Diagnostic(E030, f"there is no file `{text}`", span, "not there", help=help)])
        if path not in self._read and len(self._read) >= MAX_FILES:
            raise MdlError([Diagnostic(E033, f"a model takes part in at most {MAX_FILES} files", span)])
        return self._load(path, name=text if shipped else self._name(path), root=root)

    def _load(self, path: Path, *, name: str, root: Path) -> tree.File:
        path = path.resolve()
        if path not in self._read:
            source = sources.read(path, name=name)
            self._roots[source] = root
            self._read[path] = read_tree(source)
        return self._read[path]

    def _name(self, path: Path) -> str:
        """As seen from where the main file was called by its name."""
        if self.main.source.path is None:
            return str(path)
        base = self.main.source.path.resolve().parent
        return str(Path(self.main.source.name).parent / os.path.relpath(path, base))


def _resolved(path: Path, text: str, span: Span) -> Path:
    try:
        path = path.resolve()
        path.stat()
    except FileNotFoundError:
        pass  # gets a message of its own, with the files that are there
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "links that lead in a circle"
        raise MdlError([Diagnostic(E030, f"`{text}` cannot be followed: {reason}", span)]) from None
    return path


def _project_folder(path: Path) -> Path:
    folder = path.resolve().parent
    for above in (folder, *folder.parents):
        if (above / ".git").exists() or (above / "pyproject.toml").exists():
            return above
    return folder
