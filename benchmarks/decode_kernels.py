"""Our Triton decoding kernels on one GPU: are they right, what does a step take, which launches are best.

    python benchmarks/decode_kernels.py [--tune] [--batches 1,8,64,256] [--seconds 95] [--json FILE]

Shapes: 48 layers, d_model 2048, 64 heads of 64, d_state 128, vocab 50288 tied; weights bf16, stream float32, random.
First some sublayers' steps in float32 against their modules; or with `--tune` each kernel's candidates in microseconds
a layer, best first, as the dataclasses of `configs.py` have them: the best serve the rows after. Then a whole step
(embedding to argmax, fed back) in one CUDA graph for each path and state dtype, and a hybrid's. A row that fails
prints its error and the rest goes on. floor: bytes / 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode_launches import tune
from decode_rows import (
    BYTES_PER_S,
    ROWS,
    START,
    D,
    Limits,
    attention_state,
    captured,
    layer,
    mamba_state,
    microseconds,
    row,
)
from torch import Tensor

from mambadsl.parts.triton.decode import configs, head, steps

V, LAYERS = 50288, 48
CHECKED = ("mamba2: plain", "mamba2: groups", "attention: grouped", "attention: window", "mlp: gated", "mlp: relu2")


def correct(limits: Limits) -> None:
    """Steps in float32 against the modules, each path (tests/gpu has every form)."""
    from decode_cases import CASES, difference, past_and_future, sublayer

    def worst_of(case: str, path: str) -> float:
        made = sublayer(CASES[case], device="cuda")
        lengths = (5, 0, 17, 2, 30, 9, 1, 4, 11, 3)[: {"matvec": 3, "skinny": 6}.get(path)]
        x_BTD, expected_BTD, state = past_and_future(made, lengths=lengths, steps=3, slots=64)
        position_B = torch.tensor(lengths, device="cuda")
        step = steps.STEPS[made.mixer.kind.name]
        got = [step(made, x_BTD[:, t].clone(), position_B + t, state, path=path) for t in range(3)]
        return difference(torch.stack(got, 1), expected_BTD)

    for path in ("matvec", "skinny", "cublas"):
        def every() -> dict[str, Any]:
            worst, where, failed = 0.0, "", []
            for case in CHECKED:
                if limits.over(0.4):
                    failed.append(f"stopped before {case}")
                    break
                try:
                    found = worst_of(case, path)
                except Exception as error:  # noqa: BLE001
                    failed.append(f"{case}: {type(error).__name__}: {str(error)[:160]}")
                    continue
                if not found <= worst:
                    worst, where = found, case
            return dict(worst_error=worst, of=where, failed=failed)

        row(f"float32 against the modules, {path}", every)


def whole_step(layers: list[Any], states: list[dict[str, Tensor]], batch: int, path: steps.Path) -> dict[str, Any]:
    table = embedding()
    token_B = torch.zeros(batch, dtype=torch.int64, device="cuda")
    position_B = torch.full((batch,), 1, device="cuda")
    last = layers[0].norm

    def step() -> None:
        x_BD = F.embedding(token_B, table).float()
        for made, state in zip(layers, states):
            x_BD = steps.STEPS[made.mixer.kind.name](made, x_BD, position_B, state, path=path)
        token_B.copy_(head.most_likely(head.logits(last, x_BD, table, path=path if isinstance(path, str) else path[0])))
        position_B.add_(1)

    with torch.no_grad():
        graph = captured(step)
        us = microseconds(graph)
    weights = sum(t.numel() * t.element_size() for made in layers for t in made.mixer.state_dict().values())
    moved = sum(2 * t.numel() * t.element_size() for state in states for n, t in state.items() if n in ("conv", "ssm"))
    moved += sum(int(s["used"].sum()) * 2 * s["k"][0, 0].numel() * s["k"].element_size() for s in states if "k" in s)
    floor = (weights + table.numel() * 2 + moved) / BYTES_PER_S * 1e3
    return dict(ms=us / 1e3, floor=floor, of_floor=floor / (us / 1e3), finite=bool((token_B >= 0).all()))


@cache
def embedding() -> Tensor:
    return torch.randn(V, D, device="cuda").mul_(0.02).bfloat16()


def whole(batches: list[int], limits: Limits) -> None:
    layers = [layer("mamba2") for _ in range(LAYERS)]
    paths = {1: ("matvec",), 2: ("matvec", "skinny"), 4: ("matvec",), 8: ("skinny",), 16: ("skinny", "cublas"),
             32: (("cublas", "cublas"), ("cublas", "cublas_rounded")), 64: (("cublas", "cublas_rounded"),)}
    for batch in batches:
        for path in dict.fromkeys((configs.paths_for(batch), *paths.get(batch, ()))):
            for dtype in (torch.bfloat16, torch.float32):
                if limits.over(0.9) or (dtype == torch.float32 and path != configs.paths_for(batch)):
                    continue
                way = path if isinstance(path, str) else " + ".join(path)
                name = f"48 x mamba2, batch {batch}, {way}, state {str(dtype)[6:]}"
                row(name, lambda: whole_step(layers, [mamba_state(batch, dtype, m) for m in layers], batch, path))
                gc.collect()
                torch.cuda.empty_cache()
    hybrid = [layer("mamba2", groups=8, norm_groups=8) for _ in range(10)]
    hybrid += [layer("mlp", d_ff=8192, act="relu2") for _ in range(10)]
    hybrid += [layer("mlp", d_ff=5632, act="silu", gated=True) for _ in range(2)]
    hybrid += [layer("attention", heads=16, kv_heads=8, head_dim=128) for _ in range(4)]
    for batch, used in ((1, 4000), (8, 4000), (64, 2000)):
        if limits.over(0.95):
            break

        def states() -> Iterator[dict[str, Tensor]]:
            for made in hybrid:
                kind = made.mixer.kind.name
                yield mamba_state(batch, torch.bfloat16, made) if kind == "mamba2" else (
                    attention_state(batch, 4096, used, made) if kind == "attention" else {}
                )

        row(f"10 M, 12 F, 4 A, batch {batch}, {used} keys",
            lambda: whole_step(hybrid, list(states()), batch, configs.paths_for(batch)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--batches", default="1,8,64,256,4,2,16,32")
    parser.add_argument("--seconds", type=float, default=95)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    limits = Limits(args.seconds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.no_grad():
        if args.tune:
            tune(limits)
        else:
            correct(limits)
        whole([int(b) for b in args.batches.split(",")], limits)
    print(f"{time.monotonic() - START:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(ROWS, indent=1))


if __name__ == "__main__":
    main()
