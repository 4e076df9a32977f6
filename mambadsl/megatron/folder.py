"""Whole models: `import_megatron` and `export_megatron`, what the commands and the Python API call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mambadsl.adapt.model import ImportedModel
from mambadsl.megatron.arguments import E621, Arguments, from_mapping, read_arguments
from mambadsl.megatron.exporter import export_model
from mambadsl.megatron.importer import import_model, pattern_of
from mambadsl.megatron.pattern import Pattern, read_pattern
from mambadsl.spec.model import name_of
from mambadsl.text.diagnostic import Diagnostic, MdlError

if TYPE_CHECKING:
    from mambadsl.compile import Program

#: Beside an exported checkpoint.
ARGUMENTS = "arguments.txt"


def import_megatron(
    source: str | Path, *, args: str | Path | None = None, weights: str | Path | None = None, name: str | None = None
) -> ImportedModel:
    """A pattern, a file of arguments with a pattern among them, or a folder with a checkpoint.

    args: a file of arguments; a checkpoint has its own. Without any, the layers have our defaults. weights: a folder to
    write a checkpoint's weights to, under our names. Raises MdlError: E613, E620, E621, and what the checks find.
    """
    from mambadsl.compile import program_from_graph

    pattern, c, folder = _given(source, args)
    stem = f"{Path(source).resolve().stem}.mdl" if Path(source).exists() else "megatron.mdl"
    imported = import_model(pattern, c, name=name or name_of(stem))
    program = program_from_graph(imported.graph)
    origin = f"Megatron: {imported.pattern.source.text}"
    if weights is None:
        return ImportedModel(program, imported, origin)
    if folder is None:
        raise MdlError([Diagnostic(E621, "weights come from a checkpoint: give its folder")])
    from mambadsl.megatron.weights import Source

    tensors = Source(imported, folder)
    return ImportedModel(program, imported, origin, tuple(sorted(tensors.checkpoint.skipped)), tensors.save(weights))


def _given(source: str | Path, args: str | Path | None) -> tuple[Pattern, Arguments | None, Path | None]:
    """The pattern, the arguments, and the folder of a checkpoint."""
    path = Path(source)
    c = _read(args) if args is not None else None
    if path.is_dir():
        c = c if c is not None else _read(path)
    elif path.is_file():
        if c is not None:
            raise MdlError([Diagnostic(E621, f"arguments are in `{source}` and in `{args}`: give one of them")])
        c = _read(path)
    else:
        return read_pattern(str(source)), c, None
    pattern = pattern_of(c)
    if pattern is None:
        raise MdlError([Diagnostic(E621, f"there is no `--hybrid-layer-pattern` in `{args or source}`")])
    return pattern, c, path if path.is_dir() else None


def _read(path: str | Path) -> Arguments:
    path = Path(path)
    if path.is_dir():
        from mambadsl.megatron.checkpoint import arguments_of

        return from_mapping(arguments_of(path), form="checkpoint")
    return read_arguments(path)


@dataclass(frozen=True)
class ExportedModel:
    """text: the arguments, one flag a line."""

    text: str
    files: tuple[Path, ...] = ()


def export_megatron(
    program: Program, folder: str | Path | None = None, *, weights: str | Path | None = None, tp: int = 1
) -> ExportedModel:
    """The arguments of Megatron's model that computes the same; with `weights` (a folder of ours) also a checkpoint in
    `folder`, for `tp` tensor ranks and a pipeline rank for each stage. Raises MdlError (E613, E624)."""
    found = export_model(program.layers, tp=tp)
    if weights is None:
        return ExportedModel(found.text())
    from mambadsl.megatron.weights import export_weights

    files = export_weights(found, weights, folder, tp=tp)
    arguments = Path(folder) / ARGUMENTS
    arguments.write_text(found.text(), encoding="utf-8")
    return ExportedModel(found.text(), (*files, arguments))
