"""The processes of a run: how many, which of them this is, and the mesh that they make.

In: what torchrun says in the environment (nothing: one process), and sizes. Out: a `World`. Refuses (ValueError)
an environment that is half set, a number of processes that the sizes do not divide, and more of them than GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mambadsl.text.diagnostic import MdlError

#: Of a collective: past it, a rank that waits for one that is gone gives up, and torchrun ends the rest.
TIMEOUT = timedelta(minutes=10)
AXES = ("pipeline", "data", "tensor")
#: Multiprocessors of a GPU that may send and receive between stages; by default NCCL takes up to 32.
SENDERS = 4
#: What torchrun gives to each process.
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
PORTS = 2**16 - 1


@dataclass(frozen=True)
class World:
    """mesh: axes `pipeline`, `data`, `tensor`. files, words: groups over the CPU of all ranks; files for saving, which
    runs beside training in a thread of its own, words for what ranks tell each other meanwhile."""

    mesh: DeviceMesh
    device: torch.device
    files: dist.ProcessGroup
    words: dist.ProcessGroup

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
        return self.mesh.get_coordinate()[AXES.index(axis)]

    def ranks(self, axis: str) -> int:
        return self.mesh.size(AXES.index(axis))

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.mesh.get_group(axis)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.words)

    def most(self, number: int) -> int:
        """The largest that any rank has."""
        if self.size == 1:
            return number
        told = torch.tensor([number])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.words)
        return int(told.item())

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, value, group=self.words)
        return told

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What any rank refuses inside (ValueError, MdlError), every rank refuses, for the reason of the first that
        does: none is left waiting for another. No rank may wait for others inside."""
        own: Exception | None = None
        try:
            yield
        except (ValueError, MdlError) as error:
            own = error
        told = next((error for error in self.gathered(own) if error is not None), None)
        if told is not None:
            raise told


def size_of_world() -> int:
    """Of the run that this process belongs to, before anything is opened."""
    found = _environment()
    return found["WORLD_SIZE"] if found else 1


def _environment() -> dict[str, int] | None:
    """What torchrun says; None if it says nothing."""
    there = [name for name in NUMBERS + ADDRESS if os.environ.get(name)]
    if not {"RANK", "WORLD_SIZE"} & set(there):
        return None
    if missing := [name for name in NUMBERS + ADDRESS if name not in there]:
        raise ValueError(
            f"the environment has {', '.join(there)} but not {', '.join(missing)}: start with torchrun, which sets "
            "them all, or unset them all for one process"
        )
    found = {}
    for name in (*NUMBERS, "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise ValueError(f"{name} in the environment is `{os.environ[name]}`, not a whole number")
        found[name] = int(os.environ[name])
    if found["MASTER_PORT"] > PORTS:
        raise ValueError(f"MASTER_PORT in the environment is {found['MASTER_PORT']}; ports are up to {PORTS}")
    if not found["RANK"] < found["WORLD_SIZE"]:
        raise ValueError(f"RANK is {found['RANK']} of WORLD_SIZE {found['WORLD_SIZE']}: ranks are counted from 0")
    return found


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
    """Joins the other processes, and leaves them at the end; a group that is there already is used, and stays."""
    sizes = shape(stages=stages, tensor=tensor)
    found = _environment()
    device = _own(device, found)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    joined = not dist.is_initialized()
    if not joined:
        pass
    elif found is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        _join(backend, timeout)
    try:
        how = {"pipeline": ("nccl", _narrow(timeout))} if device.type == "cuda" and stages > 1 else None
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES, backend_override=how)
        files, words = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        yield World(mesh, device, files, words)
    finally:
        if joined:
            dist.destroy_process_group()


def _own(device: torch.device, found: dict[str, int] | None) -> torch.device:
    """The process's own device."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"training runs on cpu or cuda, not on {device.type}")
    if device.type == "cuda":
        if found:
            there = torch.cuda.device_count()
            local = int(os.environ.get("LOCAL_WORLD_SIZE", found["LOCAL_RANK"] + 1))
            if local > there:
                raise ValueError(f"{local} processes on this machine need a GPU each; it has {there}")
        number = found["LOCAL_RANK"] if found else device.index or 0
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def _narrow(timeout: timedelta) -> Any:
    """NCCL's options of a group that sends between stages. A receive that waits for its sender turns on the
    multiprocessors that layers compute on: it gets few."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.max_ctas = SENDERS
    return options


def _join(backend: str, timeout: timedelta) -> None:
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives the processes, and has what those before a restart have said.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = ":".join(os.environ[name] for name in ADDRESS)
        raise ValueError(f"the processes do not meet at {where}: {str(error).splitlines()[0]}") from None


def lost(error: RuntimeError) -> str | None:
    """In a sentence, that another process is gone; None for an error of another sort."""
    words = str(error)
    # Gloo's own errors are plain RuntimeErrors.
    if isinstance(error, dist.DistError) or "gloo" in words.lower():
        return f"another process of the run is gone ({words.splitlines()[0][:200]})"
    return None
