"""Bytes that tensors hold on a device, now and at the most: the allocator knows on a GPU, on a CPU they are counted."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def full(error: RuntimeError) -> bool:
    """Whether a device's memory is. On a CPU torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Allocated:
    """What torch's allocator has given out."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def __enter__(self) -> Allocated:
        self.before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    @property
    def held(self) -> int:
        """Since the beginning."""
        return torch.cuda.memory_allocated(self.device) - self.before

    @property
    def most(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class Counted(TorchDispatchMode):
    """The storages that operators make while this is entered, for as long as somebody has them; and those given to
    `count`."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.most = 0

    def count(self, *tensors: Any) -> None:
        for storage in _storages(tensors):
            self.storages[storage._cdata] = weakref.ref(storage)

    @property
    def held(self) -> int:
        there = {key: storage for key, ref in self.storages.items() if (storage := ref()) is not None}
        self.storages = {key: self.storages[key] for key in there}
        # Asked anew each time: FSDP takes memory from storages and gives it back.
        return sum(storage.nbytes() for storage in there.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        # A view of what was there before makes nothing.
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(given):
            if storage._cdata not in known:
                self.storages[storage._cdata] = weakref.ref(storage)
        self.most = max(self.most, self.held)
        return given


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [getattr(x, "_local_tensor", x).untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def memory(device: torch.device) -> Allocated | Counted:
    return Allocated(device) if device.type == "cuda" else Counted()
