"""Compiles the candidates of rivals' autotuned kernels in many processes, before one process measures.

Triton's tuner compiles dozens of candidates of each kernel one after the other: minutes, for mamba_ssm's. Each process
here runs a step of the rival with one layer of each kind, every candidate once, and begins elsewhere in the lists of
candidates, so that they find on disk what others have compiled. Only compiled code stays: the choice is made by the
process that measures, on an idle GPU.

    warm(text, "mamba_ssm", processes=12, seconds=120)      # the model's text, the contender's name
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent.parent
#: Processes on a GPU: each takes some 10 GiB of its memory.
BESIDE = 12


def warm(text: str, name: str, *, processes: int, seconds: float) -> int:
    """How many processes came to their end: none, where the rival is not installed."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")]))
    # Times of a busy GPU must not be taken for choices.
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_AUTOTUNING": "0", "OMP_NUM_THREADS": "1"}
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    processes = min(processes, BESIDE * len(gpus))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "rivals.warm", name, str(rank), str(processes)], cwd=HERE, text=True,
            env={**env, "CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    for child in children:
        child.stdin.write(shortened(text))
        child.stdin.close()
    good = 0
    for child in children:
        try:
            good += child.wait(max(0.1, seconds - (time.monotonic() - start))) == 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return good


def shortened(text: str) -> str:
    """The model with each of its layers once, and a small vocabulary."""
    layers = re.findall(r"^layer (\w+)", text, re.M)
    text = re.sub(r"^expect .*\n", "", text, flags=re.M)
    text = re.sub(r"\bvocab = \d+", "vocab = 1024", text)
    return re.sub(r"stack \{.*?\n\}", f"stack {{ {' '.join(layers)} }}", text, flags=re.S)


def turned(rank: int, processes: int) -> None:
    """Every tuner's list begins `rank` of `processes` parts further on, and nothing is timed."""
    from triton.runtime.autotuner import Autotuner

    make = Autotuner.__init__

    def begin_elsewhere(self, *args, **how):
        make(self, *args, **how)
        first = len(self.configs) * rank // processes
        self.configs = self.configs[first:] + self.configs[:first]

    def once(self, call, quantiles):
        call()
        return [1.0] * len(quantiles)

    Autotuner.__init__, Autotuner.do_bench = begin_elsewhere, once


def main() -> int:
    name, rank, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    turned(rank, processes)
    import train

    race = train.Race(sys.stdin.read(), device="cuda", batch=train.BATCH, length=train.LENGTH, seconds=3600)
    race.enter([name], keep_s=0)
    return 0 if any(race.contenders) else 1


if __name__ == "__main__":
    sys.exit(main())
