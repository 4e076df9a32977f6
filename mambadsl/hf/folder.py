"""Whole folders: `import_hf` and `export_hf`, what the commands and the Python API call.

Beside our weights, `hugging_face/` keeps what has no place in a model file: the configuration itself, tokenizers,
settings of generation, and which names the tensors had. An export starts from it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambadsl.adapt.model import ImportedModel
from mambadsl.hf.config import Settings, read
from mambadsl.hf.exporter import export_settings
from mambadsl.hf.importer import Imported, family_of, import_settings, says_tail
from mambadsl.spec.model import name_of
from mambadsl.text.diagnostic import Diagnostic, declare

if TYPE_CHECKING:
    from mambadsl.compile import Program

W615 = declare(
    "W615",
    "no tensors for the tokens further ahead",
    """
    The configuration says that the model predicts further tokens (multi-token prediction), and the folder has no
    tensors for that: they were not published, or left out when the model was saved, as transformers does. The model
    is imported without its `mtp` tail; its own next token does not depend on that.
    """,
)

#: Below our weights.
KEPT = "hugging_face"
#: Names and shapes of tensors that are not as the tables have them.
TENSORS = "tensors.json"
#: Files that go along, by pattern.
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template*", "*.model", "*.tiktoken",
)


def import_hf(
    source: str | Path, *, weights: str | Path | None = None, name: str | None = None
) -> ImportedModel:
    """A model of Hugging Face's: a folder, or its config.json alone.

    weights: a folder to write the weights to, under our names. name: the model's (default: the folder's). Raises
    MdlError: E610 to E613, and what the checks find.
    """
    from mambadsl.compile import program_from_graph

    source = Path(source)
    settings = read(source)
    folder = source if source.is_dir() else source.parent
    tail, notes = _tail(settings, folder)
    imported = import_settings(settings, name=name or name_of(f"{folder.resolve().name}.mdl"), tail=tail)
    imported = replace(imported, diagnostics=imported.diagnostics + notes)
    program = program_from_graph(imported.graph)
    origin = f"{imported.family.architecture}."
    if weights is None:
        return ImportedModel(program, imported, origin)
    from mambadsl.hf.weights import Source

    tensors = Source(imported, folder)
    files = tensors.save(weights)
    # The text model of a larger one is exported as one of its own.
    renamed = {} if imported.inside else tensors.renamed
    found = {"renamed": renamed, "shapes": tensors.shapes, "together": tensors.together}
    _keep(folder, Path(weights) / KEPT, settings, found)
    return ImportedModel(program, imported, origin, tensors.skipped, files)


def _tail(settings: Settings, folder: Path) -> tuple[bool | None, tuple[Diagnostic, ...]]:
    """Whether the `mtp` tail is taken along: what the configuration says, if its tensors are there; if it says nothing,
    they say it."""
    tail, said = family_of(settings).tail, says_tail(settings)
    if tail is None or said is False or not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
        return said, ()
    from mambadsl.adapt.files import names

    there = tail.ends(settings, 0)["eh_proj"] in names(folder)
    if there or not said:
        return there, ()
    key = next(key for key in tail.keys if key in settings.given)
    message = f"`{key}` is {settings.given[key]}, and no tensors predict further tokens: left out"
    return False, (Diagnostic(W615, message, settings.span(key)),)


def _keep(folder: Path, kept: Path, settings: Settings, tensors: dict[str, dict]) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.iterdir():
        if old.is_file():
            old.unlink()
    if settings.inside:
        text = json.dumps(settings.given, indent=2)
        (kept / "config.json").write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(folder / "config.json", kept / "config.json")
    _copy_companions(folder, kept)
    if any(tensors.values()):
        (kept / TENSORS).write_text(json.dumps(tensors, indent=1), encoding="utf-8")


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.resolve() != (target / file.name).resolve():
                shutil.copyfile(file, target / file.name)


@dataclass(frozen=True)
class ExportedModel:
    """family: its model_type. unchanged: the configuration is the one that the model was imported with."""

    family: str
    unchanged: bool
    files: tuple[Path, ...]


def export_hf(
    program: Program, folder: str | Path, *, weights: str | Path | None = None, family: str | None = None
) -> ExportedModel:
    """A folder that transformers loads as the family that the model fits. weights: a folder of ours; without it, the
    configuration alone is written. family: a model_type. Raises MdlError (E613, E614)."""
    folder = Path(folder)
    kept = Path(weights) / KEPT if weights is not None else None
    base = read(kept) if kept is not None and (kept / "config.json").is_file() else None
    settings, imported = export_settings(program.layers, base=base, family=family)
    files: tuple[Path, ...] = ()
    dtype = None
    if weights is not None:
        files, dtype = _export_weights(imported, Path(weights), folder, _tensors(kept))
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    if settings is base:
        shutil.copyfile(kept / "config.json", config)
    else:
        _save(settings, config, dtype)
    if base is not None:
        _copy_companions(kept, folder)
    return ExportedModel(imported.family.model_type, settings is base, (*files, config))


def _export_weights(
    imported: Imported, weights: Path, folder: Path, tensors: dict[str, dict]
) -> tuple[tuple[Path, ...], Any]:
    from mambadsl.adapt.files import Files
    from mambadsl.build.shards import MAX_FILE_BYTES, save_shards
    from mambadsl.graph.weights import all_weights
    from mambadsl.hf.weights import export_units

    files = Files(weights)
    units = list(export_units(imported.places, all_weights(imported.graph), files, **tensors))
    most = min(MAX_FILE_BYTES, max(files.sizes.values()))
    written = save_shards(
        folder, "model", units, index="model.safetensors.index.json", about={"format": "pt"}, max_file_bytes=most
    )
    [(dtype, _)] = Counter(files.dtypes.values()).most_common(1)
    return written, dtype


def _tensors(kept: Path) -> dict[str, dict]:
    file = kept / TENSORS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"renamed": {}, "shapes": {}}


def _save(settings: Settings, file: Path, dtype: Any) -> None:
    """As transformers writes it."""
    if dtype is not None and settings.config.dtype is None:
        settings.config.dtype = dtype
    file.write_text(settings.config.to_json_string(use_diff=False), encoding="utf-8")
