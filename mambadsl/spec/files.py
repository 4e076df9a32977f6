"""Imports: which file an import means, read once each, inside the project only."""

from __future__ import annotations

from pathlib import Path

from mambadsl.files import MODELS
from mambadsl.syntax import tree
from mambadsl.syntax.read import read as read_tree
from mambadsl.text import source as sources
from mambadsl.text.diagnostic import Diagnostic, Label, MdlError, declare
from mambadsl.text.source import Span
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
        self.main = main
        path = main.source.path
        self.root = _project_folder(path) if path else None
        self.read: dict[Path, tree.File] = {path.resolve(): main} if path else {}

    def std(self) -> tree.File:
        """The prelude: models/std.mdl."""
        return self._load(MODELS / "std.mdl", name="std.mdl")

    def follow(self, statement: tree.Import, importer: tree.File) -> tree.File:
        """The file that an import names. Raises MdlError at the import for every reason it cannot."""
        text, span = statement.path.value, statement.path.span
        if text.startswith("std/"):
            folder, rest = MODELS, text.removeprefix("std/")
            root = folder
        elif importer.source.path is None:
            raise MdlError([Diagnostic(
                E030, "text without a file has nothing to import from", span, "no folder to look in",
                help=("`std/...` files can be imported from anywhere",),
            )])
        else:
            folder, rest = importer.source.path.resolve().parent, text
            root = MODELS if self._shipped(importer) else self.root
        path = (folder / rest).resolve()
        if Path(rest).is_absolute() or not path.is_relative_to(root.resolve()):
            raise MdlError([Diagnostic(
                E031, "an import must stay inside the project's folder", span, f"this leads to {path.parent}",
                notes=(f"the project's folder is {root}",),
            )])
        if not path.is_file():
            near = nearest(path.name, (p.name for p in path.parent.glob("*.mdl"))) if path.parent.is_dir() else None
            help = (f'did you mean "{text[: -len(Path(rest).name)]}{near}"?',) if near else ()
            raise MdlError([Diagnostic(E030, f"there is no file `{text}`", span, help=help)])
        if path not in self.read and len(self.read) >= MAX_FILES:
            raise MdlError([Diagnostic(E033, f"more than {MAX_FILES} files", span)])
        return self._load(path, name=self._name(path, text), span=span)

    def _load(self, path: Path, *, name: str, span: Span | None = None) -> tree.File:
        path = path.resolve()
        if path not in self.read:
            try:
                self.read[path] = read_tree(sources.read(path, name=name))
            except MdlError as error:
                raise MdlError([_imported(d, span) for d in error.diagnostics]) from None
        return self.read[path]

    def _name(self, path: Path, text: str) -> str:
        if text.startswith("std/"):
            return text
        base = self.main.source.path.resolve().parent
        try:
            inside = path.relative_to(base)
        except ValueError:
            return str(path)
        return str(Path(self.main.source.name).parent / inside)

    def _shipped(self, file: tree.File) -> bool:
        return file.source.name.startswith("std/") or file.source.name == "std.mdl"


def _imported(diagnostic: Diagnostic, span: Span | None) -> Diagnostic:
    """A problem of an imported file, with the import as a second place (or the first, if it has none)."""
    if span is None:
        return diagnostic
    if diagnostic.span is None:
        return Diagnostic(diagnostic.code, diagnostic.message, span, help=diagnostic.help)
    return Diagnostic(
        diagnostic.code, diagnostic.message, diagnostic.span, diagnostic.label,
        (*diagnostic.labels, Label(span, "imported here")), diagnostic.notes, diagnostic.help,
    )


def _project_folder(path: Path) -> Path:
    folder = path.resolve().parent
    for above in (folder, *folder.parents):
        if (above / ".git").exists() or (above / "pyproject.toml").exists():
            return above
    return folder
