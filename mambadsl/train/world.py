"""The processes of a run: how many, which of them this is, and the mesh that they make.

In: what torchrun says in the environment (nothing: one process), and sizes. Out: a `World`. Refuses (ValueError)
a number of processes that the sizes do not divide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

#: Of a collective: past it, a rank that waits for one that is gone gives up, and torchrun ends the rest.
TIMEOUT = timedelta(minutes=10)
AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class World:
    """mesh: axes `pipeline`, `data`, `tensor`. files: a group over the CPU of all ranks for saving, which runs beside
    training and must not share its groups."""

    mesh: DeviceMesh
    device: torch.device
    files: dist.ProcessGroup | None

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def first(self) -> bool:
        """Who writes logs and speaks."""
        return self.rank == 0

    def at(self, axis: str) -> int:
        """This rank's place on an axis."""
        return self.mesh[axis].get_local_rank()

    def ranks(self, axis: str) -> int:
        return self.mesh[axis].size()

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.mesh[axis].get_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.files)

    def everywhere(self, flag: bool) -> bool:
        """Whether any rank says so."""
        told = torch.tensor([float(flag)])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.files)
        return bool(told.item())


def size_of_world() -> int:
    """Of the run that this process belongs to, before anything is opened."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_of_process() -> int:
    """Of this process, before anything is opened."""
    return int(os.environ.get("RANK", "0"))


def shape(*, stages: int, tensor: int, size: int | None = None) -> tuple[int, int, int]:
    """(pipeline, data, tensor) ranks. size: processes, if not those that there are. ValueError if they cannot be laid
    out so."""
    size = size_of_world() if size is None else size
    if size % (stages * tensor):
        wanted = " x ".join(f"{n} {what}" for n, what in ((stages, "stages"), (tensor, "tensor ranks")) if n > 1)
        raise ValueError(
            f"{size} process{'es' * (size > 1)} cannot be shared by {wanted}: start a multiple of {stages * tensor} "
            f"(torchrun --nproc-per-node {stages * tensor} ...)"
        )
    return stages, size // (stages * tensor), tensor


@contextmanager
def opened(device: torch.device, *, stages: int = 1, tensor: int = 1, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Joins the other processes, and leaves them at the end."""
    sizes = shape(stages=stages, tensor=tensor)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        yield World(mesh, device, dist.new_group(backend="gloo", timeout=timeout))
    finally:
        dist.destroy_process_group()
