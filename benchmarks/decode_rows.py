"""What the scripts about decoding kernels share: rows of a table, times of CUDA graphs, layers with random weights.

Imported before `mambadsl`: it finds the checkout that it lies in, and the tests' cases.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Box
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

from mambadsl.kinds.kind import Dims  # noqa: E402
from mambadsl.kinds.norm import Norm  # noqa: E402
from mambadsl.kinds.registry import get  # noqa: E402
from mambadsl.kinds.sublayer import NORM  # noqa: E402
from mambadsl.kinds.values import Values  # noqa: E402

D, BYTES_PER_S = 2048, 4.3e12
ROWS: list[dict[str, Any]] = []
START = time.monotonic()


@dataclass(frozen=True)
class Limits:
    seconds: float

    def over(self, share: float = 1.0) -> bool:
        return time.monotonic() - START > share * self.seconds


def row(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs and prints one row of the table; an error is the row's result."""
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  a benchmark's other rows are worth having
        result = dict(error=f"{type(error).__name__}: {str(error)[:300]}")
    ROWS.append(dict(name=name, **result))
    shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
    print(f"{name:44s} {shown}", flush=True)
    return result


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which runs once before it, for compilation."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, *, repeats: int = 20, series: int = 3) -> float:
    """Median over series of the mean time of a replay."""
    graph.replay()
    times = []
    for _ in range(series):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / repeats * 1e3)
    return sorted(times)[len(times) // 2]


def layer(kind: str, *, dtype: torch.dtype = torch.bfloat16, **given: Any) -> Any:
    """A sublayer as the steps see it: norm, mixer, branches."""
    from kind_values import values

    f = values(kind, d_model=D, **given)
    made = get(kind).module()(f, Dims(D, D), dtype=dtype, device="cuda").requires_grad_(False)
    for name, tensor in made.state_dict().items():
        if name == "A_log":
            tensor.uniform_(1, 16).log_()
        elif name == "dt_bias":
            dt = torch.exp(torch.empty_like(tensor).uniform_(math.log(1e-3), math.log(0.1)))
            tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif tensor.dim() > 1:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
        else:
            tensor.normal_(std=0.05).add_(1.0 if "norm" in name or name == "D" else 0.0)
    norm = Norm(NORM.convert_word("rmsnorm"), D, dtype=dtype, device="cuda").requires_grad_(False)
    norm.weight.normal_(std=0.05).add_(1)
    branch = Box(branch=Values(in_multiplier=1.0, out_multiplier=1.0))
    return Box(norm=norm, mixer=made, branches=(branch,))


def mamba_state(batch: int, dtype: torch.dtype, layer: Any) -> dict[str, Tensor]:
    f = layer.mixer.f
    C = layer.mixer.conv.weight.shape[0]
    conv = torch.zeros(batch, f.d_conv - 1, C, dtype=layer.mixer.dtype, device="cuda").mT
    return dict(conv=conv, ssm=torch.zeros(batch, f.heads, f.head_dim, f.d_state, dtype=dtype, device="cuda"))


def attention_state(batch: int, slots: int, used: int, layer: Any) -> dict[str, Tensor]:
    f = layer.mixer.f
    k, v = torch.randn(2, batch, slots, f.kv_heads, f.head_dim, dtype=layer.mixer.dtype, device="cuda").unbind(0)
    return dict(k=k, v=v, used=torch.full((batch,), used, device="cuda"))
