"""Parts and kinds of other people: installed plugins, and Python files given by `--load`.

In: an entry point of the group `mambadsl.parts`, or the path of a file. Out: what it holds, `Found`. Both are Python
that runs; a model file never names one. Refuses (MdlError, E908) what raises, holds nothing, or cannot be registered.

    PACKAGE = Package(...)      # or PACKAGES = [...]; parts called `package.part`
    KINDS = [Kind(...)]         # module_code says where their torch modules are
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from mambadsl.kinds import registry as kinds
from mambadsl.kinds.kind import Kind
from mambadsl.parts import registry
from mambadsl.parts.part import Package
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare
from mambadsl.text.source import Source, Span, read
from mambadsl.text.spell import nearest

GROUP = "mambadsl.parts"

E908 = declare(
    "E908",
    "parts or kinds that cannot be loaded",
    """
    `--load FILE.py` (or `mambadsl.load_parts`) runs a Python file, and an installed plugin (entry points of the group
    `mambadsl.parts`) is imported, to register what stands there as PACKAGE or PACKAGES (parts) and KINDS. The message
    says what went wrong: Python's own error and its line, a name that is taken, or a slot that does not exist. A part
    is called `package.part`; `mambadsl explain KIND` lists the slots of a kind.
    """,
)


@dataclass(frozen=True)
class Found:
    packages: tuple[Package, ...] = ()
    kinds: tuple[Kind, ...] = ()


#: Files that ran, so that each runs once. The commands' own processes are given them again.
_files: dict[Path, Found] = {}


def loaded_files() -> tuple[Path, ...]:
    return tuple(_files)


def load_parts(path: str | Path) -> Found:
    """Runs a Python file and registers its parts and kinds; a second time does nothing. Raises MdlError."""
    path = Path(path)
    key = path.resolve()
    if key not in _files:
        source = read(path)
        module = _run(path, source)
        _files[key] = register(module, name=str(path), source=source)
    return _files[key]


def register(holder: Any, *, name: str, source: Source | None = None) -> Found:
    """Registers PACKAGE, PACKAGES and KINDS of a module or object. name: what messages call it."""
    single = getattr(holder, "PACKAGE", None)
    packages = (*([] if single is None else [single]), *getattr(holder, "PACKAGES", ()))
    found = Found(packages, tuple(getattr(holder, "KINDS", ())))
    if not found.packages and not found.kinds:
        help = ("give it a `PACKAGE`, `PACKAGES` or `KINDS`",)
        raise MdlError([Diagnostic(E908, f"`{name}` has neither parts nor kinds", help=help)])
    # Kinds first: the file's own parts may fill their slots.
    for things, add, wanted in ((found.kinds, kinds.add, Kind), (found.packages, registry.add, Package)):
        for thing in things:
            try:
                if not isinstance(thing, wanted):
                    raise ValueError(f"a {wanted.__name__} is expected, not {thing!r}")
                add(thing)
            except ValueError as error:
                place = _first(source, getattr(thing, "name", None))
                raise MdlError([Diagnostic(E908, f"`{name}`: {error}", place, help=_help(error))]) from None
    return found


def installed() -> None:
    """Registers every installed plugin."""
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        name = f"{point.name} = {point.value}"
        try:
            holder = point.load()
        except Exception as error:
            owner = point.dist.name if point.dist else point.name
            help = (f"repair or remove it: pip uninstall {owner}",)
            raise MdlError([Diagnostic(E908, f"the plugin `{name}` raises {_said(error)}", help=help)]) from None
        register(holder, name=name)


def _run(path: Path, source: Source) -> Any:
    """The module of a file, under a name by which `Part.code` can find it again (`__name__` inside the file)."""
    name = f"mambadsl_loaded_{path.stem}_{len(_files)}"
    loader = _Text(name, str(path), source.text)
    module = module_from_spec(spec_from_loader(name, loader, origin=str(path)))
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = _line(error, path)
        place = _span(source, line) if line else None
        raise MdlError([Diagnostic(E908, f"`{path}` raises {_said(error)}", place)]) from None
    return module


class _Text(SourceFileLoader):
    """Loads text that was read already, and leaves no compiled file beside it."""

    def __init__(self, name: str, path: str, text: str):
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> Any:
        return compile(self.text, self.path, "exec", dont_inherit=True)


def _line(error: Exception, path: Path) -> int | None:
    """The last line of the file that the error came through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return lines[-1] if lines else None


def _span(source: Source, line: int) -> Span:
    line = min(line, len(source.line_starts))
    start, text = source.line_starts[line - 1], source.line_text(line)
    indent = len(text) - len(text.lstrip())
    return Span(source, start + indent, start + max(len(text.rstrip()), indent))


def _first(source: Source | None, name: str | None) -> Span | None:
    """Where a name stands in quotes first."""
    at = source.text.find(f'"{name}"') if source and name else -1
    return Span(source, at, at + len(name) + 2) if at >= 0 else None


def _said(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _help(error: ValueError) -> tuple[str, ...]:
    slot = getattr(error, "slot", None)
    near = nearest(slot, registry.all_slots()) if slot else None
    return (f"did you mean `{near}`?",) if near else ()
