"""What a rank holds of a weight: boxes of the whole, and the views of its own memory that they are in.

In: a rank's tensor (a DTensor where the data ranks share its rows) and its `Slice`. Initial values, gradients and saves
go by these boxes, so none of them knows the mesh; `SavePlanner` and `LoadPlanner` let torch.distributed.checkpoint
write and read weights of several boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mambadsl.train.slices import Slice


@dataclass(frozen=True, slots=True)
class Box:
    """view: this rank's memory. offsets: of its first element in the whole weight. copies: tensor ranks with the same;
    their boxes have the same size."""

    view: Tensor
    offsets: tuple[int, ...]
    copies: int

    def of(self, whole: Tensor) -> Tensor:
        """The same elements of another tensor of the whole's shape."""
        return whole[tuple(slice(start, start + n) for start, n in zip(self.offsets, self.view.shape))]


def local(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def boxes(tensor: Tensor, held: Slice | None, *, copies: int = 1) -> list[Box]:
    """What the rank has. copies: of a weight without a slice."""
    mine, first = local(tensor), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if held is None:
        return [Box(mine, tuple(first), copies)]
    return list(_boxes(mine, tuple(first), held))


def _boxes(mine: Tensor, first: tuple[int, ...], held: Slice) -> Iterator[Box]:
    axis = held.axis
    low, high = first[axis], first[axis] + mine.shape[axis]
    at = 0
    for piece in held.ranges:
        begin, end = max(low, at), max(low, at, min(high, at + piece.size))
        offsets = (*first[:axis], piece.start + begin - at, *first[axis + 1 :])
        yield Box(mine.narrow(axis, min(begin, high) - low, end - begin), offsets, piece.copies)
        at += piece.size


class Sliced:
    """A rank's boxes of a weight, as torch.distributed.checkpoint takes what lies in several places."""

    def __init__(self, tensor: Tensor, held: Slice):
        self.tensor = local(tensor)
        self.shape = held.shape
        found = [box for box in boxes(tensor, held) if box.view.numel()]
        self.offsets, self.views = [box.offsets for box in found], [box.view for box in found]

    def size(self) -> torch.Size:
        """Of the whole."""
        return torch.Size(self.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), view.shape) for offsets, view in zip(self.offsets, self.views)
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(view), self.size()),
            )
            for chunk, view in zip(self.__create_chunk_list__(), self.views)
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.views[self.offsets.index(tuple(index.offset))]


class SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Sliced) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """Of tensors by name, that are there already."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default puts None for what it does not know.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Sliced) else super().lookup_tensor(index)
