"""Calling the package's autotuned Triton kernels by name, with no more work a call than needed.

In: a `triton.autotune`d kernel, its grid and its arguments as keywords; out: the block sizes it ran with. Once a
configuration is chosen, the kernel under the autotuner is called: the autotuner's own way zeroes outputs that
the parts here never read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_CHOSEN: dict[tuple, Any] = {}


def launch(kernel: Any, grid: Callable[[Mapping[str, int]], tuple[int, ...]], **arguments: Any) -> Mapping[str, int]:
    """The first call with new sizes or dtypes tunes: it runs the kernel several times and synchronises."""
    tensors = [a for a in arguments.values() if isinstance(a, Tensor)]
    sizes = [arguments[name] for name in kernel.keys]
    key = (kernel, tensors[0].device, *sizes, *(t.dtype for t in tensors))
    config = _CHOSEN.get(key)
    if config is None:
        kernel[grid](**arguments)
        config = _CHOSEN[key] = kernel.best_config
    else:
        kernel.fn[grid](**arguments, **config.all_kwargs())
    return config.kwargs


def strides(tensor: Tensor | None, *names: str) -> dict[str, int]:
    """The arguments `stride_<name>` of a tensor; zeros where there is no tensor."""
    return dict(zip((f"stride_{name}" for name in names), tensor.stride() if tensor is not None else [0] * len(names),
                    strict=True))


def smallest(kernel: Any, block: str) -> int:
    """The smallest size of `block` among the kernel's configurations."""
    return min(config.kwargs[block] for config in kernel.configs)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 where Triton's interpreter runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
