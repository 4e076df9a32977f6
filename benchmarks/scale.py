"""Training over several GPUs: `mambadsl train` itself, mesh after mesh, each beside one GPU's speed.

    python benchmarks/scale.py [--ranks 2] [--model FILE] [--only REGEX] [--measure FILE] [--json FILE]
    python benchmarks/scale.py --cpu        a check of the benchmark itself: tiny, on the CPU

Each row is a run of its own under torchrun on the same random tokens; its time is the median of the steps without the
first three, its loss after the same steps must be near one GPU's. Memory is the first rank's peak. Below are the tables
of predicted and measured that each run ends with, also in the JSON: of a pipeline, what each stage's actions take and
wait for. `--measure FILE` times the layers first, under torchrun with as many ranks, and predicts from that
(`--plan-device`: from a file that is there).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
TINY = """
model tiny { vocab = 256  d_model = 32 }
layer M = mamba2(head_dim=8, d_state=8, chunk=8)
layer A = attention(heads=4)
layer F = mlp(d_ff=64)
stack { [M F A F]*4 }
"""


@dataclass
class Row:
    """name: the mesh. ranks: processes. options: of `mambadsl train`."""

    name: str
    ranks: int
    options: tuple[str, ...]
    beside: str = ""
    step_s: float = float("nan")
    tokens_per_s: float = float("nan")
    memory_gib: float = float("nan")
    loss: float = float("nan")
    note: str = ""
    told: list[str] = field(default_factory=list)
    compared: dict = field(default_factory=dict)


def rows(ranks: int, *, microbatch: int, many: int, pipeline: int) -> list[Row]:
    """Each with the row that it is compared with: as much work a GPU; of a pipeline, as large microbatches."""
    def options(count: int, *more: str) -> tuple[str, ...]:
        return "--batch", str(count * microbatch), "--microbatch", str(microbatch), *more

    stages = "--stages", str(ranks)
    return [
        Row("1 GPU", 1, options(many)),
        Row(f"{ranks} data", ranks, options(many * ranks), beside="1 GPU"),
        Row("1 GPU, 1 microbatch", 1, options(1)),
        Row(f"{ranks} data, 1 microbatch", ranks, options(ranks), beside="1 GPU, 1 microbatch"),
        Row(f"{ranks} stages 1f1b", ranks, options(pipeline, *stages), beside="1 GPU"),
        Row(f"{ranks} stages loop", ranks, options(pipeline, *stages, "--pipeline", "interleaved"), beside="1 GPU"),
        Row(f"{ranks} stages zbv", ranks, options(pipeline, *stages, "--pipeline", "zbv"), beside="1 GPU"),
        Row(f"{ranks} tensor", ranks, options(many, "--tensor", str(ranks)), beside="1 GPU"),
    ]


def launched(ranks: int, *command: str, limit: float) -> subprocess.CompletedProcess:
    """A command of mambadsl on so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "mambadsl"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, *launch, *command], env=env, timeout=limit, capture_output=True, text=True
    )


def run(row: Row, model: Path, data: Path, folder: Path, common: list[str], *, limit: float) -> None:
    out = folder / re.sub(r"\W+", "-", row.name)
    options = [o for o in common if not ("zb" in row.name and o == "--compile")]
    try:
        done = launched(row.ranks, "train", str(model), "--data", str(data), "-o", str(out), *row.options, *options,
                        limit=limit)
    except subprocess.TimeoutExpired:
        row.note = f"longer than {limit:.0f} s"
        return
    lines = done.stderr.splitlines()
    begin = next((k for k, line in enumerate(lines) if "predicted" in line and "measured" in line), len(lines))
    row.told = [line for line in lines[begin:] if line]
    if (out / "compared.json").exists():
        row.compared = json.loads((out / "compared.json").read_text())
    if done.returncode:
        row.note = f"exit {done.returncode}: " + " ".join(done.stderr.split())[-1500:]
        return
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step_s" in line and "loss" in line]
    steady = lines[3:]
    row.step_s = statistics.median(line["step_s"] for line in steady)
    row.tokens_per_s = statistics.median(line["tokens_per_s"] for line in steady)
    row.memory_gib = max(line.get("memory_bytes", 0) for line in lines) / 2**30
    row.loss = lines[-1]["loss"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks/hybrid_1_7b.mdl")
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=8, help="of a step of a GPU that has the whole model")
    parser.add_argument("--pipeline", type=int, default=32, help="microbatches of a step of a pipeline")
    parser.add_argument("--microbatch", type=int, default=2)
    parser.add_argument("--limit", type=float, default=150)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--plan-device")
    parser.add_argument("--measure", type=Path, help="times the layers first, into this file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length = 32 if given.cpu else 4096
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 256, 40_000 * (1 if given.cpu else 200)))
        layers, common = ["--length", str(length)], ["--steps", str(given.steps), "--keep", "0", "--seed", "1"]
        if given.cpu:
            model = folder / "tiny.mdl"
            model.write_text(TINY)
            layers += ["--device", "cpu"]
        else:
            model = given.model
            layers += ["--device", "cuda", "--dtype", "bf16", "--parts", "fused"]
            layers += [] if given.no_compile else ["--compile"]
        device = given.plan_device or ("cpu" if given.cpu else "h200")
        if given.measure is not None:
            device = str(given.measure)
            how = [*layers, "--batch", str(given.microbatch)]
            done = launched(given.ranks, "plan", str(model), "--measure", device, *how, limit=3 * given.limit)
            print(done.stdout if done.returncode == 0 else done.stderr[-1500:], flush=True)
        common += [*layers, "--plan-device", device]
        found = rows(given.ranks, microbatch=given.microbatch, many=given.microbatches, pipeline=given.pipeline)
        for row in found:
            if re.search(given.only, row.name):
                begun = time.monotonic()
                run(row, model, folder / "tokens.npy", folder, common, limit=given.limit)
                rate = f"{row.step_s * 1e3:9.1f} ms  {row.tokens_per_s:10,.0f} tokens/s  {row.memory_gib:6.1f} GiB"
                took = time.monotonic() - begun
                print(f"{row.name:36s} {rate}  loss {row.loss:.4f}  {row.note}  ({took:.0f} s)", flush=True)
    speed = {row.name: row.tokens_per_s for row in found}
    for row in found:
        if row.beside and not math.isnan(ratio := row.tokens_per_s / speed[row.beside]):
            print(f"{row.name}: {ratio:.2f} times `{row.beside}`")
    for row in found:
        if row.told:
            print(f"\n{row.name}", *row.told, sep="\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    return 1 if any(row.note for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
