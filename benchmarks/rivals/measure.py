"""Clocks for training steps: CUDA events, peak memory, kernels by class, the machine's own matmul peak.

On a CPU the same functions use the wall clock and report no memory: enough to check a benchmark, not to compare.
"""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GIB = 2**30
#: The first pattern that a kernel's name has is its class.
CLASSES = (
    (
        "SSD scan",
        r"_chunk_|_state_passing|_bmm_chunk|ssd|^_(pass_states|scan_forward|inputs_|scores_|groups_|steps_|add_up)",
    ),
    ("convolution", r"causal_conv1d|^conv_(for|back)ward"),
    ("attention", r"flash|fmha|sdpa|attention|softmax_warp|^cudnn"),
    ("cross entropy", r"cross_entropy|nll|_ce_|log_softmax|softmax|^_loss_kernel"),
    ("matrix product", r"gemm|nvjet|cutlass|xmma|cublas|splitK|triton_tem|matmul"),
    ("norm", r"_layer_norm|rms|norm_(fwd|bwd)|gate_norm"),
    ("copy, fill", r"^Mem(cpy|set)|copy_kernel|FillFunctor"),
    ("inductor reduction", r"^triton_(red|per)"),
    ("inductor pointwise", r"^triton_poi"),
    ("other torch", r"."),
)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after that long (a call into a library that never returns stays there)."""

    def ring(*_) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def turn_ms(step: Callable[[], object]) -> float:
    """One step timed right behind an untimed one, as in training, where the host runs ahead of the device."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def matmul_peak() -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product of random bf16 numbers (zeros would run at a higher clock)."""
    n, times = 8192, 20
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        a @ b
    end.record()
    end.synchronize()
    return times * 2 * n**3 / (start.elapsed_time(end) / 1e3)


@dataclass(frozen=True)
class Profile:
    """Of one step. kernels: name -> (milliseconds, launches)."""

    kernels: dict[str, tuple[float, float]]

    @property
    def launches(self) -> int:
        return round(sum(count for _, count in self.kernels.values()))

    @property
    def busy_ms(self) -> float:
        return sum(ms for ms, _ in self.kernels.values())

    def text(self, *, top: int = 60) -> str:
        ms, launches = Counter(), Counter()
        for name, (spent, count) in self.kernels.items():
            kind = next(kind for kind, pattern in CLASSES if re.search(pattern, name))
            ms[kind] += spent
            launches[kind] += count
        lines = [f"kernels of one step: {self.busy_ms:.1f} ms, {self.launches} launches"]
        share = 100 / max(self.busy_ms, 1e-9)
        lines += [f"  {kind:20}{m:9.2f} ms{m * share:6.1f} %{launches[kind]:8.0f}" for kind, m in ms.most_common()]
        largest = sorted(self.kernels.items(), key=lambda item: -item[1][0])[:top]
        lines += [f"  {m:9.3f} ms{n:7.0f}  {name[:90]}" for name, (m, n) in largest]
        return "\n".join(lines)


def profiled(step: Callable[[], object], *, steps: int = 2) -> Profile:
    """Slows later launches down: to be used after everything is timed."""
    from torch.profiler import ProfilerActivity, profile

    step()
    sync()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        sync()
    ms, launches = Counter(), Counter()
    for event in found.events():
        if str(event.device_type).endswith("CUDA") and not event.name.startswith(("ProfilerStep", "## ")):
            ms[event.name] += event.time_range.elapsed_us() / 1e3 / steps
            launches[event.name] += 1 / steps
    return Profile({name: (ms[name], launches[name]) for name in ms})
