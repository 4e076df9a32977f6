"""Megatron's checkpoints of its `torch` form: a file for each tensor and pipeline rank, read without Megatron.

    release/mp_rank_00/model_optim_rng.pt          tensor rank 0, one pipeline rank
    iter_0001000/mp_rank_01_002/...                tensor rank 1 of pipeline rank 2

In: a folder. Out: `Checkpoint`, names with layers numbered from 0 over all pipeline segments, and the shards of each.
Files are loaded as weights only: no code in them runs, and what is no tensor is left inert. Raises MdlError (E613).
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambadsl.adapt.files import refuse
from mambadsl.megatron.flags import FLAGS
from mambadsl.megatron.pattern import held

LATEST, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d{3}))?(_\d{3})?")
#: What holds no weights: state of FP8, counters of routers, tables of rotations.
EMPTY = "*._extra_state", "*tokens_per_expert", "*rotary_pos_emb.inv_freq"
#: Names of other versions -> those of the tables.
RENAMED = (
    (re.compile(r"(\.mixer)\.conv1d\.(weight|bias)$"), r"\1.conv1d_\2"),
    (re.compile(r"(\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight$"), r"\1.\3.weight\2"),
)
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(?=\.)")


class Inert:
    """In place of whatever a file wants to make: nothing."""

    def __new__(cls, *args: Any, **more: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **more: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load(file: Path) -> dict[str, Any]:
    """What a file holds, with tensors on disk until they are looked at. Raises MdlError."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        stand_ins = [(type("Inert", (Inert,), {}), name) for name in unknown if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([Namespace, *stand_ins]):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise refuse(f"`{file}` is damaged, or no checkpoint: {why or type(error).__name__}") from None
    if not isinstance(found, dict):
        raise refuse(f"`{file}` is no checkpoint: it holds {type(found).__name__}")
    return found


def iteration_of(folder: Path) -> Path:
    """The folder of ranks: the given one, or the one that it names as its latest."""
    latest = folder / LATEST
    if latest.is_file():
        word = latest.read_text(encoding="utf-8").strip()
        name = word if word == "release" else f"iter_{int(word):07d}" if word.isdigit() else None
        if name is None or not (folder / name).is_dir():
            raise refuse(f"`{latest}` names `{word[:40]}`, which is not there")
        return folder / name
    return folder


def arguments_of(folder: str | Path) -> Mapping[str, Any]:
    """The arguments that a checkpoint was trained with, those that `FLAGS` knows; also of a `common.pt`, which
    distributed checkpoints have. Raises MdlError."""
    at = iteration_of(Path(folder))
    files = [*sorted(at.glob(f"mp_rank_*/{FILE}")), *at.glob("common.pt")]
    if not files:
        raise refuse(f"there is no checkpoint in `{folder}`: no mp_rank_*/{FILE}")
    args = load(files[0]).get("args")
    if not isinstance(args, Namespace):
        return {}
    return {name: value for name, value in vars(args).items() if name in FLAGS and not isinstance(value, Inert)}


class Checkpoint:
    """shards: of each tensor, by tensor rank. tp, pp: ranks. skipped: what holds no weights."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        at = iteration_of(self.folder)
        if not at.is_dir():
            raise refuse(f"there is no folder `{folder}`")
        ranks = {match: path for path in sorted(at.iterdir()) if (match := _RANK.fullmatch(path.name))}
        if not ranks:
            raise refuse(f"there is no checkpoint in `{folder}`: no mp_rank_*/{FILE}")
        self._files = {(int(match[1]), int(match[2] or 0)): load(path / FILE) for match, path in ranks.items()}
        first = next(iter(self._files.values()))
        # With one pipeline rank, ranks of experts are numbered as those of pipelines are.
        if any(match[3] for match in ranks) or getattr(first.get("args"), "expert_model_parallel_size", 1) > 1:
            raise refuse(f"`{at}` has experts on ranks of their own: only one rank of experts is read")
        self.tp, self.pp = (1 + max(rank[axis] for rank in self._files) for axis in (0, 1))
        if len(self._files) != self.tp * self.pp:
            raise refuse(f"`{at}` lacks ranks: {len(self._files)} of {self.tp} x {self.pp} are there")
        self.chunks = len(self._models(0, 0))
        self.shards: dict[str, list[Tensor]] = {}
        self.skipped: set[str] = set()

    @property
    def segments(self) -> int:
        """Of the pipeline."""
        return self.pp * self.chunks

    def number(self, stages: Sequence[int]) -> None:
        """Fills `shards`. stages: layers of each segment. What several stages have is the first one's."""
        starts = [0, *accumulate(stages)]
        for tp in range(self.tp):
            found: dict[str, Tensor] = {}
            for rank in range(self.pp):
                for segment, model in zip(held(rank, self.pp, self.segments), self._models(tp, rank), strict=True):
                    for name, tensor in self._named(model, starts[segment]):
                        found.setdefault(name, tensor)
            if tp and found.keys() != self.shards.keys():
                odd = sorted(found.keys() ^ self.shards.keys())
                raise refuse("the tensor ranks have different tensors", notes=[f"only in some: `{n}`" for n in odd])
            for name, tensor in found.items():
                self.shards.setdefault(name, []).append(tensor)

    def _models(self, tp: int, pp: int) -> list[Mapping[str, Any]]:
        """The state of each segment of a rank."""
        found = self._files[tp, pp]
        chunks = [found[name] for name in ("model", *(f"model{i}" for i in range(len(found)))) if name in found]
        if not chunks or not all(isinstance(chunk, Mapping) for chunk in chunks):
            raise refuse(f"rank {tp}, {pp} of `{self.folder}` holds no model")
        return chunks

    def _named(self, model: Mapping[str, Any], start: int) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.items():
            name = str(name).removeprefix("module.")
            name = _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + start}", name)
            for old, new in RENAMED:
                name = old.sub(new, name)
            if any(fnmatchcase(name, pattern) for pattern in EMPTY):
                self.skipped.add(name)
            elif isinstance(tensor, Tensor):
                yield name, tensor


def save(folder: Path, rank: str, model: dict[str, Tensor], arguments: Mapping[str, Any]) -> Path:
    """One rank's file of a release, complete or not at all."""
    at = folder / "release" / rank
    at.mkdir(parents=True, exist_ok=True)
    every = {name: flag.default for name, flag in FLAGS.items()} | dict(arguments)
    part = at / f"{FILE}.part"
    torch.save({"args": Namespace(**every), "checkpoint_version": 3.0, "iteration": 0, "model": model}, part)
    return part.replace(at / FILE)


def local(name: str, start: int) -> str:
    """A tensor's name in its segment, whose first layer is `start`."""
    return _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) - start}", name)


def layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[2]) if found else None
