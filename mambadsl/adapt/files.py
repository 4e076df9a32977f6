"""The tensors in a folder of somebody else's, or of ours: safetensors files, or pytorch_model.bin; read one by one.

Out: `Files`, with names, shapes and dtypes at once and values when asked for. Raises MdlError (E613) for a folder
without tensors, damaged files, indices that name what is not there, and one name with two values. `.bin` files are
loaded as weights only: no code in them runs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambadsl.build.checkpoint import LISTED, listed
from mambadsl.build.shards import DTYPES
from mambadsl.kinds.kind import Weight
from mambadsl.text.diagnostic import Diagnostic, MdlError, declare

E613 = declare(
    "E613",
    "tensors that do not fit",
    """
    Every tensor of a folder has its place in the imported model, and every weight of the model comes from the folder.
    The message lists what is missing, what nobody takes, and what has another shape than the configuration says. A
    folder that was not downloaded completely lacks whole files; names that nobody takes mean layers that the
    configuration does not speak of.
    """,
)


class Files:
    """shapes, dtypes, file_of: by name. sizes: bytes of each file."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if not self.folder.is_dir():
            raise refuse(f"there is no folder `{folder}`")
        found = self._files()
        if not found:
            raise refuse(f"there are no tensors in `{folder}`: no *.safetensors, no pytorch_model*.bin")
        self.sizes = {file: file.stat().st_size for file in found}
        for file in found:
            for name, shape, dtype in self._listed(file):
                if name in self.file_of:
                    self._same(name, self.file_of[name], file)
                else:
                    self.shapes[name], self.dtypes[name], self.file_of[name] = shape, dtype, file

    def get(self, name: str) -> Tensor:
        return self._get(name, self.file_of[name])

    def _get(self, name: str, file: Path) -> Tensor:
        opened = self._opened(file)
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def _same(self, name: str, *files: Path) -> None:
        """Stages of a pipeline each save the tied table, and layers that they share."""
        one, other = (self._get(name, file) for file in files)
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise refuse(f"`{name}` differs between `{files[0].name}` and `{files[1].name}`")

    def _opened(self, file: Path) -> Any:
        """The last two files stay open: a weight of ours may come from both sides of a border."""
        if file not in self._open:
            while len(self._open) > 1:
                del self._open[next(iter(self._open))]
            self._open[file] = _open(file)
        return self._open[file]

    def _listed(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        opened = self._opened(file)
        if isinstance(opened, dict):
            yield from ((name, tuple(t.shape), t.dtype) for name, t in opened.items() if isinstance(t, Tensor))
            return
        for name in opened.keys():
            part = opened.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in DTYPES:
                raise refuse(f"`{name}` in `{file.name}` has the dtype {dtype}, which has no counterpart")
            yield name, tuple(part.get_shape()), DTYPES[dtype]

    def _files(self) -> list[Path]:
        """Those that an index names, else the one of the usual name, else all: some folders hold the same tensors
        twice, in two libraries' forms."""
        for pattern, usual in ("*.safetensors", "model.safetensors"), ("pytorch_model*.bin", "pytorch_model.bin"):
            for index in sorted(self.folder.glob(f"{pattern}.index.json")) or self._own_index(pattern):
                return self._indexed(index)
            if (self.folder / usual).is_file():
                return [self.folder / usual]
            if found := sorted(self.folder.glob(pattern)):
                for index in sorted(self.folder.glob("weights-stage-*.index.json")):
                    self._indexed(index)
                return found
        return []

    def _own_index(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob("weights.index.json")) if pattern == "*.safetensors" else []

    def _indexed(self, index: Path) -> list[Path]:
        named = {str(name) for name in _read_index(index).values()}
        if lost := sorted(name for name in named if not (self.folder / name).is_file()):
            raise refuse(f"`{self.folder}` lacks files that `{index.name}` names", notes=lost)
        return [self.folder / name for name in sorted(named)]


def names(folder: Path) -> Collection[str]:
    """Of the tensors in a folder: by its index, where it has one, which needs no other file."""
    for index in sorted(folder.glob("*.index.json")):
        return _read_index(index).keys()
    return Files(folder).shapes.keys()


def _read_index(index: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise refuse(f"`{index}` is no index of tensors: it has no `weight_map`") from None


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".bin":
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return safe_open(file, "pt")
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        why = " ".join(str(error).split())[:200]
        raise refuse(f"`{file}` is damaged, or no file of tensors: {why}") from None
    except Exception as error:
        raise refuse(f"`{file}` is no file of tensors alone: {type(error).__name__}") from None


def refuse(message: str, *, notes: list[str] = ()) -> MdlError:
    return MdlError([Diagnostic(E613, message, notes=tuple(notes[:LISTED]))])


def hold(files: Files, weights: Mapping[str, Weight]) -> None:
    """A folder of ours has these weights and no others. Raises MdlError (E613)."""
    missing = [path for path in weights if path not in files.shapes]
    unknown = [path for path in files.shapes if path not in weights]
    bent = [path for path in weights if path in files.shapes and files.shapes[path] != weights[path].shape]
    if missing or unknown or bent:
        facts = [*listed("missing", missing, unknown), *listed("unknown", unknown, missing)]
        facts += [
            f"shape of `{p}`: {list(files.shapes[p])} in the folder, {list(weights[p].shape)} in the model"
            for p in bent[:LISTED]
        ]
        raise MdlError([Diagnostic(E613, f"the weights in `{files.folder}` do not fit the model", notes=tuple(facts))])
