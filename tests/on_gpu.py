"""What tests of kernels share: marks, CUDA graphs, and errors relative to the reference's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def error(found: Tensor, reference: Tensor) -> float:
    """The norm of the difference over the norm of the reference."""
    found, reference = found.detach().double(), reference.detach().double()
    return ((found - reference).norm() / reference.norm().clamp_min(1e-12)).item()


def replayed(function: Callable[..., Sequence[Tensor]], given: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """Results of a CUDA graph of function(*given), with the contents of `new` written into `given`.

    Everything that `function` does (a backward pass too) is captured after three runs on a side stream.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*given)
    with torch.no_grad():
        for place, content in zip(given, new, strict=True):
            place.copy_(content)
    graph.replay()
    torch.cuda.synchronize()
    return [r.detach().clone() for r in results]
