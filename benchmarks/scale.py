"""Training over several GPUs: `mambadsl train` itself, mesh after mesh, each beside one GPU's speed.

    python benchmarks/scale.py [--ranks 2] [--model FILE] [--only REGEX] [--measure FILE] [--json FILE]
    python benchmarks/scale.py --megatron   beside each of some meshes, Megatron-Core with the same split
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
from itertools import accumulate
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rivals.warm import warm  # noqa: E402

import mambadsl  # noqa: E402
from mambadsl.train.run import planning  # noqa: E402
from mambadsl.train.settings import Settings  # noqa: E402

TINY = """
model tiny { vocab = 256  d_model = 32 }
layer M = mamba2(head_dim=8, d_state=8, chunk=8)
layer A = attention(heads=4)
layer F = mlp(d_ff=64)
stack { [M F A F]*4 }
"""


@dataclass
class Row:
    """name: the mesh. ranks: processes. options: of `mambadsl train`. megatron: it is Megatron-Core's, on the rows and
    from the weights of the row `beside`."""

    name: str
    ranks: int
    options: tuple[str, ...]
    beside: str = ""
    megatron: bool = False
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


def rivals(ours: list[Row]) -> list[Row]:
    """Megatron-Core's, each with the split of a row of ours."""
    return [
        Row(f"{row.name}, megatron", row.ranks, row.options, beside=row.name, megatron=True)
        for row in ours if not re.search("microbatch|loop|zb|tensor", row.name)
    ]


def place(folder: Path, name: str) -> Path:
    return folder / re.sub(r"\W+", "-", name)


def command(row: Row, model: Path, data: Path, folder: Path, common: list[str]) -> list[str]:
    """What runs under torchrun."""
    out = place(folder, row.name)
    if not row.megatron:
        return ["-m", "mambadsl", "train", str(model), "--data", str(data), "-o", str(out), *row.options, *common]
    given = dict(zip(row.options[::2], row.options[1::2]))
    same = [f"{name}={value}" for name, value in zip(common, common[1:]) if name in ("--length", "--seed")]
    same += [f"{name}={given[name]}" for name in ("--batch", "--microbatch")]
    theirs = ["-m", "rivals.megatron_ranks", "--beside", str(place(folder, row.beside)), "--model", str(model)]
    theirs += ["--data", str(data), "--out", str(out), f"--cuts={','.join(map(str, cuts(row, model, given, common)))}"]
    return [*theirs, *same]


def cuts(row: Row, model: Path, given: dict[str, str], common: list[str]) -> list[int]:
    """The layers at which the stages of our run after the first begin."""
    if "--stages" not in given:
        return []
    told = dict(zip(common, common[1:]))
    settings = Settings(
        length=int(told["--length"]), batch=int(given["--batch"]), microbatch=int(given["--microbatch"]),
        stages=row.ranks, dtype=told["--dtype"], parts=told["--parts"], compile="--compile" in common,
    )
    plan = planning(mambadsl.load(model), settings, device=told["--plan-device"], ranks=row.ranks)
    ends = accumulate(sum(path.startswith("stack.") for path in stage.paths) for stage in plan.stages)
    return list(ends)[:-1]


def launched(ranks: int, *command: str, limit: float) -> subprocess.CompletedProcess:
    """A module on so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = {"TRITON_CACHE_AUTOTUNING": "1", **os.environ, "PYTHONPATH": paths}
    command = [sys.executable, *launch, *command]
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, error = running.communicate(timeout=limit)
    except subprocess.TimeoutExpired as late:
        # torchrun ends its processes, which say where they are.
        running.terminate()
        _, error = running.communicate()
        raise subprocess.TimeoutExpired(command, limit, stderr=error) from late
    return subprocess.CompletedProcess(command, running.returncode, out, error)


def run(row: Row, model: Path, data: Path, folder: Path, common: list[str], *, limit: float) -> None:
    out = place(folder, row.name)
    try:
        done = launched(row.ranks, *command(row, model, data, folder, common), limit=limit)
    except subprocess.TimeoutExpired as late:
        row.note = f"longer than {limit:.0f} s"
        row.told = [line for line in late.stderr.splitlines() if re.match(r'(Current t|T)hread |  File "', line)]
        return
    lines = done.stderr.splitlines()
    begin = next((k for k, line in enumerate(lines) if "predicted" in line and "measured" in line), len(lines))
    row.told = [line for line in lines[begin:] if line]
    if (out / "compared.json").exists():
        row.compared = json.loads((out / "compared.json").read_text())
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "elastic" not in line]
        errors = [k for k, line in enumerate(said) if re.search(r"Error\b", line)]
        said = said[max(0, errors[0] - 6) : errors[0] + 1] if errors else said
        row.note = "\n".join([f"exit {done.returncode}:", *said])
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
    parser.add_argument("--megatron", action="store_true")
    parser.add_argument("--warm", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes, for --megatron")
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
            plan = ["-m", "mambadsl", "plan", str(model), "--measure", device]
            done = launched(given.ranks, *plan, *how, limit=3 * given.limit)
            print(done.stdout if done.returncode == 0 else done.stderr[-1500:], flush=True)
        common += [*layers, "--plan-device", device]
        found = rows(given.ranks, microbatch=given.microbatch, many=given.microbatches, pipeline=given.pipeline)
        if given.megatron and not given.cpu:
            found += rivals(found)
            # Their kernels' candidates, dozens for each kernel, would be compiled one after the other.
            good = warm(model.read_text(), "megatron", processes=given.warm, seconds=given.limit) if given.warm else 0
            print(f"Megatron's kernels compiled by {good} of {given.warm} processes", flush=True)
        for row in found:
            if re.search(given.only, row.name):
                begun = time.monotonic()
                run(row, model, folder / "tokens.npy", folder, common, limit=given.limit)
                rate = f"{row.step_s * 1e3:9.1f} ms  {row.tokens_per_s:10,.0f} tokens/s  {row.memory_gib:6.1f} GiB"
                took = time.monotonic() - begun
                print(f"{row.name:36s} {rate}  loss {row.loss:.4f}  {row.note}  ({took:.0f} s)", flush=True)
                print(*(f"    {line}" for line in row.told), sep="\n", flush=True)
                if given.json:
                    given.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    speed = {row.name: row.tokens_per_s for row in found}
    for row in found:
        if row.beside and not math.isnan(ratio := row.tokens_per_s / speed[row.beside]):
            print(f"{row.name}: {ratio:.2f} times `{row.beside}`")
    return 1 if any(row.note for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
