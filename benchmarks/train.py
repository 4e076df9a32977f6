"""Forward and backward of mambadsl and of its rivals on one GPU: same shapes, same weights, one run.

    python benchmarks/train.py [--model hybrid|mamba2_1_3b|all] [--rivals megatron,transformers,mamba_ssm]
                               [--only REGEX] [--json FILE] [--steps 12] [--budget 400] [--warm 14] [--profile]
    python benchmarks/train.py --cpu        a check of the benchmark itself: tiny, no GPU, reference parts

Loss, gradient norm and the embedding's gradient are compared with ours before any time counts: a row that
differs says MISMATCH and takes no part in the ratios. Then the contenders take turns; medians of the turns.
A contender that fails says why, and the rest go on. Exit status 1 if there is no row of ours, or one differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402

if torch.cuda.is_available():
    try:
        # Before whatever else loads cuDNN: late, it opens the system's beside torch's.
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        print(f"transformer_engine does not load: {error}", file=sys.stderr)

from rivals.contender import Contender, Shape  # noqa: E402
from rivals.measure import GIB, at_most, matmul_peak, profiled, sync, turn_ms  # noqa: E402
from rivals.ours import VARIANTS, Ours  # noqa: E402
from rivals.warm import warm  # noqa: E402

import mambadsl  # noqa: E402

ROOT = Path(__file__).parent.parent
LENGTH, BATCH = 4096, 2
#: Relative differences from ours beyond which a row does not count: loss, gradient norm, embedding's gradient.
#: Roundings of bf16 in 48 layers move the last by a few percent, those of FP8 by more.
TOLERANCE = (2e-2, 1e-1, 2.5e-1)
TOLERANCE_FP8 = (2e-2, 2e-1, 6e-1)
TINY = """
model tiny { vocab = 128  d_model = 32  context = 64  norm = rmsnorm(eps=1e-5)  tie_embeddings = false }
layer M = mamba2(heads=4, head_dim=16, d_state=16, groups=2, chunk=16)
layer A = attention(heads=4, kv_heads=2, head_dim=8, rope=none)
layer F = mlp(d_ff=64, act=relu2)
stack { M F A M F }
"""


@dataclass(frozen=True)
class Task:
    """order: the contenders, most valuable first; the first of ours is what the others are compared with."""

    text: str
    order: tuple[str, ...]


#: contender's prefix -> module of `rivals`, and what `--rivals` calls it.
RIVALS = {"megatron": "megatron", "transformers": "nemotron_h", "mamba_ssm": "mamba_lm"}
HYBRID = (
    "fused", "megatron", "transformers", "fused compile graph", "keep compile graph", "te", "te graph", "fused compile",
    "fused graph", "te fp8", "te fp8 graph", "megatron fp8", "megatron graph",
)
#: Only when `--only` asks: what is slow to start, or could spoil the process for the others.
ON_REQUEST = ("megatron fp8", "megatron graph", "te fp8 graph")
PURE = ("fused", "mamba_ssm", "fused compile graph", "keep compile graph", "fused compile", "fused graph")


@dataclass
class Row:
    name: str
    ours: bool = False
    loss: float = float("nan")
    grad_norm: float = float("nan")
    differences: tuple[float, ...] = ()
    peak_gib: float = float("nan")
    first_step_s: float = float("nan")
    kernels: int | None = None
    note: str = ""
    ms: list[float] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        return bool(self.ms) and not self.note

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


class Race:
    """One model, its contenders, and what was measured of them."""

    def __init__(self, text: str, *, device: str, batch: int, length: int, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.device, self.length = device, length
        program = mambadsl.load(text=text)
        self.shape = Shape.of(program)
        flops = program.cost(length=length).flops
        self.flops = float(flops.forward + flops.backward_input + flops.backward_weight) * batch * length
        self.tokens = batch * length
        cpu = device == "cpu"
        every = {parts: "reference" for parts in ("fused", "keep", "te", "te_fp8")} if cpu else {}
        self.ours = Ours(
            text, device=device, dtype="fp32" if cpu else "bf16", parts=every,
            backend="aot_eager" if cpu else "inductor",
        )
        generator = torch.Generator().manual_seed(1)
        self.tokens_BT = torch.randint(0, self.shape.vocab, (batch, length), generator=generator).to(device)
        self.rows: dict[str, Row] = {}
        self.contenders: dict[str, Contender] = {}
        self.expected: tuple[float, float, torch.Tensor] | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def enter(self, names: list[str], *, keep_s: float) -> None:
        """Builds, checks and warms up, while more than `keep_s` seconds are left for the timing."""
        for name in names:
            if name in self.rows:
                continue
            row = self.rows[name] = Row(name, ours=name in VARIANTS)
            if self.left() < keep_s:
                row.note = "no time left"
                continue
            made: list[Contender] = []
            with _Guard(row, seconds=min(120, self.left() - keep_s)):
                made = list(self._made(name))
            for contender in made:
                row = self.rows.setdefault(contender.name, Row(contender.name))
                with _Guard(row, seconds=min(300, self.left())):
                    self._check(contender, row)
                    self.contenders[contender.name] = contender
                print(f"# {row.name}: loss {row.loss:.5f} {row.note}, {self.left():.0f} s left", flush=True)
            if not made:
                print(f"# {name}: {row.note}", flush=True)
            gc.collect()

    def _made(self, name: str) -> Iterator[Contender]:
        if name in VARIANTS:
            yield self.ours.contender(name)
            return
        package, _, how = name.partition(" ")
        build = import_module(f"rivals.{RIVALS[package]}").build
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        options = dict(device=self.device, dtype=dtype, length=self.length, **({how: True} if how else {}))
        yield from build(self.shape, self.ours.weights(), **options)

    def _check(self, contender: Contender, row: Row) -> None:
        """Two steps and their memory, then results against ours."""
        cuda = self.device != "cpu"
        weights = sum({p.data_ptr(): p.nbytes for p in contender.parameters}.values())
        for number in range(3):
            self._forget(contender)
            if cuda:
                sync()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            start = time.monotonic()
            loss = contender.run(self.tokens_BT)
            sync()
            if number == 0:
                row.first_step_s = time.monotonic() - start
            if cuda and number == (0 if contender.first_step_is_largest else 2):
                row.peak_gib = (torch.cuda.max_memory_allocated() - before + weights) / GIB
        row.loss = loss.item()
        squares = [p.grad.float().square().sum() for p in contender.parameters if p.grad is not None]
        row.grad_norm = torch.stack(squares).sum().sqrt().item()
        embedding = contender.embedding.grad
        if self.expected is None:
            self.expected = row.loss, row.grad_norm, embedding.detach().clone()
        loss, norm, reference = self.expected
        apart = (embedding.float() - reference.float()).norm() / reference.float().norm()
        row.differences = abs(row.loss / loss - 1), abs(row.grad_norm / norm - 1), apart.item()
        tolerance = TOLERANCE_FP8 if "fp8" in row.name else TOLERANCE
        if not all(found <= most for found, most in zip(row.differences, tolerance)):
            row.note = "MISMATCH"
        self._forget(contender)

    def _forget(self, contender: Contender) -> None:
        for p in contender.parameters:
            p.grad = None

    def time(self, steps: int) -> None:
        """Rounds in which every contender has one turn."""
        for _ in range(steps):
            for name in list(self.contenders):
                if self.left() < 5:
                    return
                contender, row = self.contenders[name], self.rows[name]
                with _Guard(row, seconds=30):
                    row.ms.append(turn_ms(lambda: contender.run(self.tokens_BT)))
                    self._forget(contender)
                if row.note and row.note != "MISMATCH":
                    self.contenders.pop(name)

    def look(self, *, profile: bool) -> None:
        """Kernels of a step of each: how many, and whether a rival ran its torch path in silence."""
        best = min((r for r in self.rows.values() if r.ours and r.counts), key=lambda r: r.median, default=None)
        for name, contender in list(self.contenders.items()):
            if self.left() < 5:
                return
            row = self.rows[name]
            with _Guard(row, seconds=20):
                found = profiled(lambda: contender.run(self.tokens_BT))
                row.kernels = found.launches
                if not row.ours and not any("chunk_scan" in kernel for kernel in found.kernels):
                    row.note = "ran without mamba_ssm's kernels"
                if profile and row is best:
                    print(f"\n{name}\n{found.text()}\n", flush=True)
            self._forget(contender)

    def close(self) -> None:
        for contender in self.contenders.values():
            contender.close()
        self.contenders.clear()
        self.ours.models.clear()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


class _Guard:
    """What fails or takes too long inside becomes the row's note, and its trace goes to stderr."""

    def __init__(self, row: Row, *, seconds: float):
        self.row, self.limit = row, at_most(seconds)

    def __enter__(self) -> None:
        self.limit.__enter__()

    def __exit__(self, kind, error, trace) -> bool:
        self.limit.__exit__(None, None, None)
        if error is None or not isinstance(error, Exception):
            return False
        first = str(error).strip().splitlines()[:1] or [""]
        self.row.note = f"{kind.__name__}: {first[0]}"[:160]
        traceback.print_exception(kind, error, trace, limit=-8, file=sys.stderr)
        return True


def table(race: Race, title: str, peak: float | None) -> str:
    rows = sorted(race.rows.values(), key=lambda row: row.median if row.counts else float("inf"))
    lines = [f"\n{title}: forward + backward, {race.tokens} tokens, {race.flops / 1e12:.1f} TFLOP"]
    if peak:
        lines[0] += f", measured matmul peak {peak / 1e12:.0f} TFLOP/s"
    lines.append(
        f"{'':22}{'ms':>9}{'min':>9}{'max':>9}{'n':>4}{'tokens/s':>10}{'of peak':>8}{'GiB':>7}{'kernels':>8}"
        f"{'loss':>9}{'norm':>9}{'embed':>9}"
    )
    for row in rows:
        differences = "".join(f"{d:9.1e}" for d in row.differences)
        if not row.counts:
            lines.append(f"{row.name:22} {row.note or 'not timed'} {differences}")
            continue
        share = f"{race.flops / (row.median / 1e3) / peak:8.1%}" if peak else f"{'-':>8}"
        lines.append(
            f"{row.name:22}{row.median:9.2f}{min(row.ms):9.2f}{max(row.ms):9.2f}{len(row.ms):4}"
            f"{1e3 * race.tokens / row.median:10,.0f}{share}{row.peak_gib:7.1f}{row.kernels or 0:8}{differences}"
        )
    lines += _ratios([row for row in rows if row.counts])
    return "\n".join(lines)


def _ratios(rows: list[Row]) -> Iterator[str]:
    rivals = [row for row in rows if not row.ours]
    for row in rows:
        if row.ours and rivals:
            against = ", ".join(f"{rival.median / row.median:.2f} x {rival.name}" for rival in rivals)
            yield f"  speed of {row.name}: {against}"


def run(name: str, task: Task, args: argparse.Namespace, *, seconds: float, peak: float | None) -> tuple[Race, dict]:
    batch, length = (2, 48) if args.cpu else (BATCH, LENGTH)
    race = Race(task.text, device="cpu" if args.cpu else "cuda", batch=batch, length=length, seconds=seconds)
    named = [entry for entry in task.order if entry in VARIANTS or entry.split()[0] in args.rivals]
    wanted = [n for n in named if re.search(args.only, n)] if args.only else [n for n in named if n not in ON_REQUEST]
    rivals = {n.split()[0]: n for n in reversed(wanted) if n not in VARIANTS}
    for rival in rivals.values() if args.warm and not args.cpu else ():
        # They all run mamba_ssm's kernels: one that is installed will do.
        if good := warm(task.text, rival, processes=args.warm, seconds=race.left() / 2):
            print(f"# {good} processes compiled the kernels of {rival}, {race.left():.0f} s left", flush=True)
            break
    race.enter(wanted, keep_s=min(60, seconds / 4))
    race.time(args.steps)
    if not args.cpu:
        race.look(profile=args.profile)
    print(table(race, name, peak), flush=True)
    rows = [dict(asdict(row), median=row.median if row.ms else None) for row in race.rows.values()]
    return race, dict(model=name, tokens=race.tokens, flops=race.flops, matmul_peak=peak, rows=rows)


def tasks(args: argparse.Namespace) -> dict[str, Task]:
    if args.cpu:
        return {"tiny": Task(TINY, (*HYBRID, "mamba_ssm"))}
    files = {"hybrid": ("benchmarks/hybrid_1_7b.mdl", HYBRID), "mamba2_1_3b": ("models/mamba2_1_3b.mdl", PURE)}
    found = {name: Task((ROOT / path).read_text(encoding="utf-8"), order) for name, (path, order) in files.items()}
    return found if args.model == "all" else {args.model: found[args.model]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("hybrid", "mamba2_1_3b", "all"), default="all")
    parser.add_argument("--rivals", type=lambda text: text.split(","), default=list(RIVALS), help="comma-separated")
    parser.add_argument("--only", default="", help=f"contenders by name; needed for {', '.join(ON_REQUEST)}")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each contender")
    parser.add_argument("--budget", type=float, default=400, help="seconds for all of it")
    parser.add_argument(
        "--warm", type=int, default=max(0, (os.cpu_count() or 1) - 2), metavar="PROCESSES",
        help="to compile rivals' kernels in first (0: one after the other, when they run)",
    )
    parser.add_argument("--profile", action="store_true", help="kernels of the fastest of ours")
    parser.add_argument("--cpu", action="store_true", help="check the benchmark itself, without a GPU")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device: `--cpu` checks the benchmark without one")
    start = time.monotonic()
    if args.cpu:
        torch.set_num_threads(1)
        args.steps = min(args.steps, 2)
    peak = None if args.cpu else matmul_peak()
    found, good = [], True
    chosen = tasks(args)
    for number, (name, task) in enumerate(chosen.items()):
        left = args.budget - (time.monotonic() - start)
        # The first model has more rows, and the longer first steps.
        seconds = left * 0.65 if number + 1 < len(chosen) else left
        race, data = run(name, task, args, seconds=seconds, peak=peak)
        ours = [row for row in race.rows.values() if row.ours]
        good &= any(row.counts for row in ours) and not any(row.note == "MISMATCH" for row in ours)
        race.close()
        found.append(data)
        if args.json:
            machine = "cpu" if args.cpu else torch.cuda.get_device_name()
            args.json.write_text(json.dumps(dict(machine=machine, torch=torch.__version__, runs=found), indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
