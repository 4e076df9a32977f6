"""What a small hybrid learns from a few MB of English on a CPU, and how fast, beside Hugging Face's Mamba-2.

    python -m pip install accelerate                  # transformers' Trainer needs it
    apt-get download bible-kjv bible-kjv-text && for f in bible-kjv*.deb; do dpkg-deb -x $f kjv; done
    kjv/usr/bin/bible -p kjv/usr/lib -l0 gen1:1-rev22:21 < /dev/null > bible.txt
    python benchmarks/learn.py --data bible.txt [--lr 3e-3 6e-3 1e-2] [--steps 200] [--batch 8] [--threads 1] [--json]

Ours is `learn.mdl` by `mambadsl train`, theirs Mamba2ForCausalLM by transformers.Trainer (`rivals/hf_trainer.py`),
each a process of its own; they take turns. Same bytes in the same order, rows of a step, length, steps, AdamW, decay,
warm-up, cosine to the same floor, clipping, float32, threads; as many weights (2 %, ours at most theirs); every
learning rate for both, the best of each counts. The held-out loss is the mean over the same tokens, in nats; tokens/s
are of the median step without the first three. A side decides itself which weights decay and how initial values are
drawn (`learn.mdl` draws linears, tables and A as widely as theirs). Exit status 1 if ours learns less or is slower. The
text of the results is the King James Bible of Debian's packages, 4.3 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

import mambadsl
from mambadsl.graph.cost import costs, total

HERE = Path(__file__).parent
MODEL = HERE / "learn.mdl"
#: As wide as ours, with its mixer. Chunks of 32 and 64 take it the same time, 128 longer.
CONFIG = dict(
    vocab_size=256, hidden_size=128, num_hidden_layers=6, expand=2, num_heads=4, head_dim=64, state_size=64, n_groups=1,
    chunk_size=64, tie_word_embeddings=True, use_cache=False,
)
#: `mambadsl train`'s own, which no flag changes.
ADAM = dict(betas=(0.9, 0.95), eps=1e-8)


def output(command: list[str], *, threads: int) -> str:
    """What a process prints; RuntimeError with its complaint if it fails."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ...: {done.stderr.strip()}")
    return done.stdout


def ours(given: dict[str, Any], *, threads: int) -> dict[str, Any]:
    flags = ("length", "batch", "steps", "lr", "warmup", "floor", "weight_decay", "clip", "seed", "held_out")
    command = [sys.executable, "-m", "mambadsl", "train", str(MODEL), "--device", "cpu", "--keep", "0", "--json"]
    command += [word for flag in flags for word in (f"--{flag.replace('_', '-')}", str(given[flag]))]
    command += [word for path in given["data"] for word in ("--data", path)]
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(output([*command, "-o", folder], threads=threads))
    return {key: found[key] for key in ("held_out", "step_s")}


def theirs(given: dict[str, Any], *, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = json.dumps({**given, **ADAM, "config": CONFIG, "folder": folder})
        printed = output([sys.executable, str(HERE / "rivals" / "hf_trainer.py"), words], threads=threads)
    return json.loads(printed.splitlines()[-1])


SIDES = {"mambadsl": ours, "transformers": theirs}


def weights() -> dict[str, int]:
    """How many each side trains; a tied table counts once. RuntimeError if they are not as many."""
    with torch.device("meta"):
        there = Mamba2ForCausalLM(Mamba2Config(**CONFIG)).num_parameters()
    here = total(costs(mambadsl.load(MODEL).layers)).params
    if not 0.98 * there <= here <= there:
        raise RuntimeError(f"ours has {here:,} weights, which is not within 2 % below their {there:,}")
    return {"mambadsl": here, "transformers": there}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each learning rate and side."""
    rows = []
    for lr in args.lr:
        for name, side in SIDES.items():
            given = dict(
                data=args.data, length=256, batch=args.batch, steps=args.steps, lr=lr, warmup=args.steps // 10,
                floor=0.1, weight_decay=0.1, clip=1.0, seed=args.seed, held_out=args.held_out,
            )
            found = side(given, threads=args.threads)
            speed = args.batch * 256 / found["step_s"]
            rows.append(dict(
                side=name, lr=lr, held_out=found["held_out"], tokens_per_s=speed, load=os.getloadavg()[0]
            ))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="as of `mambadsl train`")
    parser.add_argument("--lr", nargs="+", type=float, default=[3e-3, 6e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 bytes in a step")
    parser.add_argument("--held-out", type=float, default=0.01, help="share of the rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if find_spec("accelerate") is None:
        parser.error("transformers' Trainer needs accelerate: python -m pip install accelerate")
    count, rows = weights(), measure(args)

    found = {}
    for name in SIDES:
        mine = [row for row in rows if row["side"] == name]
        best = min(mine, key=lambda row: row["held_out"])
        speed = statistics.median(row["tokens_per_s"] for row in mine)
        found[name] = dict(weights=count[name], lr=best["lr"], held_out=best["held_out"], tokens_per_s=speed)
    here, there = found.values()
    good = here["held_out"] <= there["held_out"] and here["tokens_per_s"] >= there["tokens_per_s"]
    if args.json:
        setting = dict(steps=args.steps, batch=args.batch, length=256, threads=args.threads, seed=args.seed)
        print(json.dumps({**setting, **found, "runs": rows}))
        return 0 if good else 1
    print(f"{args.steps} steps of {args.batch} rows of 256 bytes, {args.threads} threads, float32\n")
    print(f"{'':14}{'lr':>8}{'held-out':>10}{'tokens/s':>10}{'load':>6}")
    for row in rows:
        print(f"{row['side']:14}{row['lr']:8.0e}{row['held_out']:10.4f}{row['tokens_per_s']:10,.0f}{row['load']:6.1f}")
    print(f"\n{'best':14}{'lr':>8}{'held-out':>10}{'tokens/s':>10}{'weights':>10}")
    for name, row in found.items():
        print(f"{name:14}{row['lr']:8.0e}{row['held_out']:10.4f}{row['tokens_per_s']:10,.0f}{row['weights']:10,}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
