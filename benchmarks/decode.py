"""Milliseconds a token in decoding: mambadsl, mamba_ssm, transformers; same weights, one run, and the memory floor.

    python benchmarks/decode.py [--batches 1,8,64,256] [--only REGEX] [--budget 400] [--tokens 64] [--json FILE]
                                [--parts inference] [--profile]
    python benchmarks/decode.py --cpu        a check of the benchmark itself: tiny, no GPU, reference parts

First what is written is checked: greedy tokens in float32 against whole forward passes of the reference, and the
logits of forced tokens in bf16 against float32, beside the rivals' own errors. Then every writer writes n and 2n
tokens, several times: `ms/token` is the difference over n, `plain` the time of n over n, prompt included. The floor is
the bytes that a step must move (weights once, states twice, keys and values so far) over this machine's
copy bandwidth. Then a hybrid with keys and values, at two lengths, ours only; transformers, the slowest by far, last.
A row that fails says why, and the rest go on. Exit status 1 if no row of ours counts.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
from rivals.decoding import WRITERS, Models, mamba_ssm_forced, ours_forced, transformers_whole  # noqa: E402
from rivals.measure import at_most, profiled, sync  # noqa: E402
from torch import Tensor  # noqa: E402

import mambadsl  # noqa: E402
from mambadsl.run.decode import Decoder  # noqa: E402

ROOT = Path(__file__).parent.parent
FILES = {"pure": "models/mamba2_1_3b.mdl", "hybrid": "benchmarks/hybrid_1_7b.mdl"}
PROMPT, LENGTHS = 128, {"cuda": (512, 4096), "cpu": (16, 40)}
#: Not run unless asked for by --only.
SLOW = "static"
#: Measured last.
SLOWEST = "transformers"
OURS = "mambadsl"
TINY = """
model tiny { vocab = 128  d_model = 32  context = 64  norm = rmsnorm(eps=1e-5)  tie_embeddings = true }
layer M = mamba2(heads=4, head_dim=16, d_state=16, groups=1, chunk=16)
stack { M*3 }
"""
TINY_HYBRID = """
model tiny { vocab = 128  d_model = 32  context = 64  norm = rmsnorm(eps=1e-5)  tie_embeddings = false }
layer M = mamba2(heads=4, head_dim=16, d_state=16, groups=2, chunk=16)
layer A = attention(heads=4, kv_heads=2, head_dim=8, rope=none)
layer F = mlp(d_ff=64, act=relu2)
stack { M F A M F }
"""


class Bench:
    """One run: its settings, its clock, its rows."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.start, self.rows = args, time.monotonic(), []
        self.device = "cpu" if args.cpu else "cuda"
        self.bandwidth = copy_bandwidth(self.device)

    @property
    def left(self) -> float:
        return self.args.budget - (time.monotonic() - self.start)

    def wanted(self, name: str) -> bool:
        return bool(re.search(self.args.only, name)) if self.args.only else SLOW not in name

    def row(self, name: str, what: Callable[[], dict], *, seconds: float = 90, **about: Any) -> dict:
        """Runs one measurement; a failure becomes the row's `error`."""
        begun, row = time.monotonic(), {"name": name, **about}
        try:
            if self.left < 5:
                raise TimeoutError("no time left")
            with at_most(min(seconds, self.left)):
                row |= what()
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            if not isinstance(error, TimeoutError):
                traceback.print_exc(limit=-5)
        row["took_s"] = round(time.monotonic() - begun, 1)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return row

    def prompts(self, models: Models, batch: int, length: int) -> Tensor:
        vocab = models.program.layers.model.vocab
        generator = torch.Generator().manual_seed(batch + length)
        return torch.randint(0, vocab, (batch, length), generator=generator).to(self.device)


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    count = 2**30 if device == "cuda" else 2**24
    a, b = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    times = [clock(lambda: b.copy_(a)) for _ in range(8)]
    return 2 * count / min(times)


def clock(run: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def floor_ms(decoder: Decoder, *, tokens: int, bandwidth: float) -> float:
    """tokens: of each row so far. Everything read once; states of fixed size written as well."""
    total = sum(t.nbytes for t in decoder.model.tensors().values())
    if not decoder.model.graph.tied:
        total -= decoder.model.embed.weight.nbytes
    for state in decoder.state.layers.values():
        for name, tensor in state.items():
            if name in ("k", "v"):
                total += tensor.nbytes * tokens // tensor.shape[1]
            elif name != "used":
                total += 2 * tensor.nbytes
    return 1e3 * total / bandwidth


def check_tokens(bench: Bench, models: Models, *, count: int = 8) -> dict:
    """Greedy tokens of the engine in float32, and of whole forward passes of the reference."""
    prompts_BT = bench.prompts(models, 2, 48)
    ours, truth = models.exact(models.parts), models.exact("reference")
    # The prompt token by token: nothing but the steps, and no tuning of prompt kernels for float32.
    with Decoder(ours, batch=2, capacity=48 + count, prefill_chunk=1) as decoder, torch.no_grad():
        decoder.prefill(prompts_BT.tolist())
        found_BT = torch.cat(list(decoder.blocks(count))).T
        tokens_BT = prompts_BT
        for _ in range(count):
            tokens_BT = torch.cat((tokens_BT, truth(tokens_BT, last=1)[:, -1].argmax(-1, keepdim=True)), 1)
    same = (found_BT == tokens_BT[:, prompts_BT.shape[1] :].cpu()).sum().item()
    logits = ours_forced(ours, tokens_BT, 1, state=torch.float32)[:, -count - 1 :]
    with torch.no_grad():
        wanted = truth(tokens_BT, last=count + 1)
    return {"same_tokens": f"{same} of {found_BT.numel()}", "relative_error": relative(logits, wanted)}


def check_logits(bench: Bench, models: Models, *, rivals: bool, count: int = 16) -> dict:
    """Relative errors of bf16 logits at forced tokens against float32."""
    tokens_BS = bench.prompts(models, 4, PROMPT + count if bench.device == "cuda" else 24 + count)
    prompt = tokens_BS.shape[1] - count
    truth = models.exact("reference")
    with torch.no_grad():
        wanted = truth(tokens_BS, last=count + 1)
    found = {}
    for name, state in ("bf16 state", torch.bfloat16), ("fp32 state", torch.float32):
        found[f"mambadsl, {name}"] = relative(ours_forced(models.narrow, tokens_BS, prompt, state=state), wanted)
    forced = {
        "mamba_ssm": lambda: mamba_ssm_forced(models.mamba_ssm, tokens_BS, prompt),
        "transformers (whole)": lambda: transformers_whole(models.transformers, tokens_BS, prompt),
    }
    for name, logits in forced.items() if rivals else ():
        try:
            found[name] = relative(logits(), wanted)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(f"{((found - wanted).norm() / wanted.norm()).item():.2e}")


def speed(bench: Bench, models: Models, name: str, batch: int, floors: dict[int, float]) -> dict:
    n, rounds = bench.args.tokens, 2 if name.startswith("transformers") else 5
    length = PROMPT if bench.device == "cuda" else 8
    prompts_BT = bench.prompts(models, batch, length)
    begun = time.monotonic()
    writer = WRITERS[name](models, batch, length + 2 * n)
    try:
        writer.write(prompts_BT, 4 if name.startswith("transformers,") else 2 * n)
        ready = time.monotonic() - begun
        took = {k: [clock(lambda: writer.write(prompts_BT, k)) for _ in range(rounds)] for k in (n, 2 * n)}
        once, twice = (statistics.median(took[k]) for k in (n, 2 * n))
        row = {"ms": 1e3 * (twice - once) / n, "plain_ms": 1e3 * once / n, "best_ms": 1e3 * min(took[2 * n]) / (2 * n)}
        if writer.decoder is not None:
            row["floor_ms"] = floor_ms(writer.decoder, tokens=length + n, bandwidth=bench.bandwidth)
            floors.setdefault(batch, row["floor_ms"])
        if batch in floors:
            row["of_floor"] = row["ms"] / row.get("floor_ms", floors[batch])
        return {key: round(value, 4) for key, value in row.items()} | {"ready_s": round(ready, 1)}
    finally:
        writer.close()


def hybrid_speed(bench: Bench, models: Models, batch: int, length: int, state: torch.dtype) -> dict:
    n, rounds = 32, 5
    with Decoder(models.narrow, batch=batch, capacity=length + (rounds + 1) * n + 1, state_dtype=state) as decoder:
        prefill = clock(lambda: decoder.prefill(bench.prompts(models, batch, length).tolist()))
        list(decoder.blocks(n))
        took = [clock(lambda: list(decoder.blocks(n))) for _ in range(rounds)]
        ms, floor = 1e3 * statistics.median(took) / n, floor_ms(decoder, tokens=length, bandwidth=bench.bandwidth)
        found = {"ms": ms, "floor_ms": floor, "of_floor": ms / floor, "prefill_s": prefill}
        return {key: round(value, 4) for key, value in found.items()}


def profile_steps(bench: Bench, models: Models, batch: int, state: torch.dtype) -> dict:
    with Decoder(models.narrow, batch=batch, capacity=PROMPT, state_dtype=state) as decoder:
        decoder.prefill(bench.prompts(models, batch, 8).tolist())
        list(decoder.blocks(8))
        found = profiled(lambda: list(decoder.blocks(1)))
        print(f"\nbatch {batch}, {str(state)[6:]} state: {found.text(top=16)}", flush=True)
        return {"launches": found.launches, "busy_ms": round(found.busy_ms, 3)}


def table(bench: Bench) -> str:
    lines = [f"\ncopy bandwidth {bench.bandwidth / 1e12:.2f} TB/s; prompt {PROMPT}, {bench.args.tokens} tokens timed"]
    lines += [f"{row['name']}: {_facts(row)}" for row in bench.rows if "batch" not in row]
    columns = f"{'ms/token':>10}{'plain':>9}{'x floor':>9}{'tokens/s':>10}  ours is faster by"
    lines.append(f"{'batch':>5}  {'writer':32}{columns}")
    best: dict[tuple, float] = {}
    for row in bench.rows:
        if row["name"].startswith(OURS) and "ms" in row:
            key = row["batch"], row.get("context")
            best[key] = min(best.get(key, row["ms"]), row["ms"])
    for row in bench.rows:
        if "batch" not in row:
            continue
        name = row["name"] + (f", at {row['context']}" if "context" in row else "")
        if "ms" not in row:
            lines.append(f"{row['batch']:5}  {name:32}  {row.get('error', '')[:80]}")
            continue
        ours = best.get((row["batch"], row.get("context")))
        ratio = "" if row["name"].startswith(OURS) or not ours else f"{row['ms'] / ours:.2f}"
        plain = f"{row['plain_ms']:9.3f}" if "plain_ms" in row else " " * 9
        floor = f"{row['of_floor']:9.2f}" if "of_floor" in row else " " * 9
        rate = 1e3 * row["batch"] / row["ms"] if row["ms"] else 0
        lines.append(f"{row['batch']:5}  {name:32}{row['ms']:10.3f}{plain}{floor}{rate:10,.0f}  {ratio}")
    return "\n".join(lines)


def _facts(row: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("name", "took_s"))


def pure(bench: Bench, models: Models, batches: list[int]) -> dict[int, float]:
    """The floors, by batch."""
    floors: dict[int, float] = {}
    if bench.wanted("check"):
        bench.row("check, fp32", lambda: check_tokens(bench, models))
        bench.row("check, bf16", lambda: check_logits(bench, models, rivals=True))
    written(bench, models, batches, floors, [name for name in WRITERS if not name.startswith(SLOWEST)])
    for batch in batches if bench.args.profile else ():
        bench.row("profile", lambda: profile_steps(bench, models, batch, torch.bfloat16))
    return floors


def written(bench: Bench, models: Models, batches: list[int], floors: dict[int, float], names: list[str]) -> None:
    for batch in batches:
        for name in filter(bench.wanted, names):
            bench.row(name, lambda: speed(bench, models, name, batch, floors), batch=batch)


def hybrid(bench: Bench, models: Models, batches: list[int]) -> None:
    if bench.wanted("hybrid check"):
        bench.row("hybrid check, fp32", lambda: check_tokens(bench, models))
        bench.row("hybrid check, bf16", lambda: check_logits(bench, models, rivals=False))
    for length in LENGTHS[bench.device] if bench.wanted("mambadsl hybrid") else ():
        for batch in (b for b in batches if b <= 64):
            about = dict(batch=batch, context=length)
            bench.row("mambadsl hybrid", lambda: hybrid_speed(bench, models, batch, length, torch.bfloat16), **about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches (`check`, `hybrid`, ...)")
    parser.add_argument("--budget", type=float, default=400, metavar="SECONDS")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--parts", default="inference", help="our part set")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--profile", action="store_true", help="the kernels of our steps, at the end")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        args.parts, args.batches, args.tokens = "reference", "1,2", min(args.tokens, 4)
    batches = [int(batch) for batch in args.batches.split(",")]
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench(args)
    models = {}
    for tiny, name in (TINY, "pure"), (TINY_HYBRID, "hybrid"):
        text = tiny if args.cpu else (ROOT / FILES[name]).read_text(encoding="utf-8")
        models[name] = Models(mambadsl.load(text=text), device=bench.device, parts=args.parts)
    floors = pure(bench, models["pure"], batches)
    hybrid(bench, models["hybrid"], batches)
    written(bench, models["pure"], batches, floors, [name for name in WRITERS if name.startswith(SLOWEST)])
    print(table(bench))
    if args.json:
        device = "cpu" if args.cpu else torch.cuda.get_device_name()
        facts = {"device": device, "torch": torch.__version__, "bandwidth": bench.bandwidth, "rows": bench.rows}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0 if any(row["name"].startswith(OURS) and "ms" in row for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
