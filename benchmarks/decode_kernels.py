"""Our Triton decoding kernels on one GPU: are they right, what does a step take, which launches are best.

    python benchmarks/decode_kernels.py [--tune] [--batches 1,8,64,256] [--seconds 95] [--json FILE]

Shapes: 48 layers, d_model 2048, 64 heads of 64, d_state 128, vocab 50288 tied; weights bf16, stream float32, random.
First some sublayers' steps in float32 against their modules; or with `--tune` the best configurations of each kernel as
`configs.py` has them, (elements or rows, columns, warps, stages). Then a whole step (embedding to argmax, fed back) in
one CUDA graph for each path and state dtype, and a hybrid's. A row that fails prints its error and the rest goes on.
floor: bytes / 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace as Box
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

from mambadsl.kinds.kind import Dims  # noqa: E402
from mambadsl.kinds.norm import Norm  # noqa: E402
from mambadsl.kinds.registry import get  # noqa: E402
from mambadsl.kinds.sublayer import NORM  # noqa: E402
from mambadsl.kinds.values import Values  # noqa: E402
from mambadsl.parts.triton.decode import configs, head, linear, mixer, steps  # noqa: E402
from mambadsl.parts.triton.decode.configs import Block, Tile  # noqa: E402
from mambadsl.parts.triton.decode.norm import RowNorm  # noqa: E402

D, V, LAYERS = 2048, 50288, 48
BYTES_PER_S = 4.3e12
CHECKED = ("mamba2: plain", "mamba2: groups", "attention: grouped", "attention: window", "mlp: gated", "mlp: relu2")
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
    conv = torch.zeros(batch, layer.mixer.conv.weight.shape[0], f.d_conv - 1, dtype=layer.mixer.dtype, device="cuda")
    return dict(conv=conv, ssm=torch.zeros(batch, f.heads, f.head_dim, f.d_state, dtype=dtype, device="cuda"))


def attention_state(batch: int, slots: int, used: int, layer: Any) -> dict[str, Tensor]:
    f = layer.mixer.f
    k, v = torch.randn(2, batch, slots, f.kv_heads, f.head_dim, dtype=layer.mixer.dtype, device="cuda").unbind(0)
    return dict(k=k, v=v, used=torch.full((batch,), used, device="cuda"))


def correct(limits: Limits) -> None:
    """Steps in float32 against the modules, each path (tests/gpu has every form)."""
    from decode_cases import CASES, difference, past_and_future, sublayer

    def worst_of(case: str, path: str) -> float:
        made = sublayer(CASES[case], device="cuda")
        lengths = (5, 0, 17) if path == "matvec" else (5, 0, 17, 2, 30, 9)
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


def whole_step(layers: list[Any], states: list[dict[str, Tensor]], batch: int, path: str) -> dict[str, Any]:
    table = embedding()
    token_B = torch.zeros(batch, dtype=torch.int64, device="cuda")
    position_B = torch.full((batch,), 1, device="cuda")
    last = layers[0].norm

    def step() -> None:
        x_BD = F.embedding(token_B, table).float()
        for made, state in zip(layers, states):
            x_BD = steps.STEPS[made.mixer.kind.name](made, x_BD, position_B, state, path=path)
        token_B.copy_(head.most_likely(head.logits(last, x_BD, table, path=path)))
        position_B.add_(1)

    with torch.no_grad():
        graph = captured(step)
        us = microseconds(graph)
    weights = sum(t.numel() * t.element_size() for made in layers for t in made.mixer.state_dict().values())
    moved = sum(2 * t.numel() * t.element_size() for state in states for n, t in state.items() if n in ("conv", "ssm"))
    floor = (weights + table.numel() * 2 + moved) / BYTES_PER_S * 1e3
    return dict(ms=us / 1e3, floor=floor, of_floor=floor / (us / 1e3), finite=bool((token_B >= 0).all()))


@cache
def embedding() -> Tensor:
    return torch.randn(V, D, device="cuda").mul_(0.02).bfloat16()


def whole(batches: list[int], limits: Limits) -> None:
    layers = [layer("mamba2") for _ in range(LAYERS)]
    paths = {1: ("matvec", "skinny", "cublas"), 2: ("matvec", "skinny"), 4: ("matvec", "skinny", "cublas"),
             8: ("matvec", "skinny", "cublas"), 16: ("skinny", "cublas"), 32: ("skinny", "cublas")}
    for batch in batches:
        for path in paths.get(batch, ("cublas",)):
            for dtype in (torch.bfloat16, torch.float32):
                if limits.over(0.9) or (dtype == torch.float32 and path != configs.path_for(batch)):
                    continue
                name = f"48 x mamba2, batch {batch}, {path}, state {str(dtype)[6:]}"
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
            lambda: whole_step(hybrid, list(states()), batch, configs.path_for(batch)))


def tune(limits: Limits) -> None:
    """Best configuration of each kernel by batch, many layers' worth of weights in one graph (more than the cache)."""
    count = 12
    layers = [layer("mamba2") for _ in range(count)]
    f = layers[0].mixer.f
    E, I = layers[0].mixer.in_proj.weight.shape[0], f.heads * f.head_dim

    def best(name: str, candidates: list[Any], work: Callable[[Any, Any], Any], floor: float) -> None:
        def sweep() -> dict[str, Any]:
            found, errors = {}, []
            for candidate in candidates:
                if limits.over(0.75):
                    break
                try:
                    with torch.no_grad():
                        graph = captured(lambda: [work(made, candidate) for made in layers])
                        found[candidate] = microseconds(graph, repeats=5) / count
                except Exception as error:  # noqa: BLE001
                    errors.append(f"{candidate}: {type(error).__name__} {str(error)[:80]}")
            order = sorted(found, key=found.__getitem__)[:3]
            text = " | ".join(f"{found[c]:.1f} us {c if isinstance(c, str) else astuple(c)}" for c in order)
            return dict(floor_us=floor * 1e6, best=text, **({"errors": errors[:2]} if errors else {}))

        row(name, sweep)

    blocks = [Block(e, c, w) for e, c, w in (
        (8192, 4096, 4), (8192, 4096, 8), (16384, 4096, 8), (16384, 2048, 4), (32768, 4096, 8), (32768, 4096, 16),
        (16384, 4096, 16), (8192, 2048, 4), (4096, 2048, 4))]
    tiles = [Tile(r, c, w, s) for r, c, w, s in (
        (16, 256, 4, 5), (16, 256, 2, 5), (16, 512, 4, 4), (32, 256, 4, 4), (16, 128, 2, 8), (32, 128, 4, 6))]
    mixers = [Tile(r, warps=w) for r, w in ((8, 1), (16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 4))]
    for batch in (1, 64, 8, 256, 4, 2, 16, 128, 32):
        x = torch.randn(batch, D, device="cuda")
        y = torch.randn(batch, I, device="cuda")
        zx = torch.randn(batch, E, device="cuda", dtype=torch.bfloat16)
        if batch <= 8:
            def in_proj(made: Any, tile: Any, x: Tensor = x) -> None:
                norm = steps.norm_of(made.norm)
                linear.norm_linear(x, made.mixer.in_proj.weight, norm=norm, path="matvec", tile=tile)

            def out_proj(made: Any, tile: Any, x: Tensor = x, y: Tensor = y) -> None:
                linear.linear_add(y, made.mixer.out_proj.weight, None, x, path="matvec", tile=tile,
                                  norm=RowNorm(made.mixer.gate_norm.weight, 1e-5), out_scale=1e-3)

            # Each costs a compilation per batch.
            some = blocks if batch == 1 else blocks[:4] if batch < 8 else blocks[1:3]
            best(f"in_proj matvec, batch {batch}", some, in_proj, 2 * E * D / BYTES_PER_S)
            best(f"out_proj matvec, batch {batch}", some, out_proj, 2 * I * D / BYTES_PER_S)
        if 2 <= batch <= 32:
            def skinny(made: Any, tile: Any, x: Tensor = x) -> None:
                norm = steps.norm_of(made.norm)
                linear.norm_linear(x, made.mixer.in_proj.weight, norm=norm, path="skinny", tile=tile)

            def skinny_out(made: Any, tile: Any, x: Tensor = x, y: Tensor = y) -> None:
                linear.linear_add(y, made.mixer.out_proj.weight, None, x, path="skinny", tile=tile,
                                  norm=RowNorm(made.mixer.gate_norm.weight, 1e-5), out_scale=1e-3)

            best(f"norm + in_proj skinny, batch {batch}", tiles, skinny, 2 * E * D / BYTES_PER_S)
            best(f"norm + out_proj skinny, batch {batch}", tiles, skinny_out, 2 * I * D / BYTES_PER_S)
        for dtype in (torch.bfloat16, torch.float32):
            states = {id(made): mamba_state(batch, dtype, made) for made in layers}

            def mix(made: Any, tile: Tile, zx: Tensor = zx, states: dict = states) -> None:
                m, state = made.mixer, states[id(made)]
                mixer.mix(zx, state["conv"], state["ssm"], conv_weight_CK=m.conv.weight, conv_bias_C=m.conv.bias,
                          dt_bias_H=m.dt_bias, A_log_H=m.A_log, D_H=m.D, tile=tile)

            bytes_moved = 2 * sum(t.numel() * t.element_size() for t in states[id(layers[0])].values())
            best(f"mixer, batch {batch}, {str(dtype)[6:]}", mixers, mix, bytes_moved / BYTES_PER_S)
            del states
        if batch >= 16:
            def library(made: Any, how: str, x: Tensor = x, y: Tensor = y) -> None:
                yb = y.bfloat16()
                if how == "addmm to float32":
                    torch.ops.aten.addmm.dtype_out(x, yb, made.mixer.out_proj.weight.t(), torch.float32, out=x)
                else:
                    x.add_(F.linear(yb, made.mixer.out_proj.weight))

            best(f"out_proj cublas, batch {batch}", ["addmm to float32", "linear, then add"], library,
                 2 * I * D / BYTES_PER_S)


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
