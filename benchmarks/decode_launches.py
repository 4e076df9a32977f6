"""The launches that `decode_kernels.py --tune` tries, by batch: rows with each kernel's candidates, best first.

The best one is written into the tables of `configs.py` that this process holds, for the rows after it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from decode_rows import (
    BYTES_PER_S,
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
from triton.runtime.jit import JITFunction

from mambadsl.parts.triton.decode import configs, linear, mixer, steps
from mambadsl.parts.triton.decode.attention import attend
from mambadsl.parts.triton.decode.configs import Scan, Tile
from mambadsl.parts.triton.decode.conv import Shift, convolve
from mambadsl.parts.triton.decode.norm import RowNorm


@dataclass(frozen=True)
class Sweep:
    """A kernel at a batch with its candidates. work(layer, candidate): one launch of it. found(candidate): what the
    winner changes for the whole steps that follow."""

    name: str
    candidates: tuple[Any, ...]
    work: Callable[[Any, Any], Any]
    floor: float
    found: Callable[[Any], Any] = lambda candidate: None


def set_row(table: tuple, batch: int, entry: Any) -> tuple:
    """The table with this entry for the batches up to `batch` that were not larger rows'."""
    return tuple(sorted((dict(table) | {batch: entry}).items()))


def sweeps(layers: list[Any]) -> Iterator[Sweep]:
    f = layers[0].mixer.f
    E, I = layers[0].mixer.in_proj.weight.shape[0], f.heads * f.head_dim
    scans = {2: (Scan(16), Scan(16, ahead=1056), Scan(16, 1, 96), Scan(16, 1, 96, 1056), Scan(8), Scan(32),
                 Scan(64, 4)),
             4: (Scan(8), Scan(8, ahead=2112), Scan(16, 1, 96), Scan(16, 2), Scan(4), Scan(32, 4))}
    ways = tuple(Tile(*t) for t in (
        (16, 256, 4, 4, 4), (16, 512, 4, 3, 4), (16, 256, 4, 3, 4), (32, 256, 4, 3, 4), (32, 128, 2, 5, 1)))
    for batch in (64, 8, 256):
        for dtype in (torch.bfloat16, torch.float32):
            yield mixer_sweep(layers, batch, dtype, scans[dtype.itemsize])
    for batch in (8, 4, 16, 32, 64):
        x, y = torch.randn(batch, D, device="cuda"), torch.randn(batch, I, device="cuda")

        def enter(made: Any, way: Any, x: Tensor = x) -> None:
            how = dict(path=way) if isinstance(way, str) else dict(path="skinny", tile=way)
            linear.norm_linear(x, made.mixer.in_proj.weight, norm=steps.norm_of(made.norm), **how)

        def leave(made: Any, way: Any, x: Tensor = x, y: Tensor = y) -> None:
            how = dict(path=way) if isinstance(way, str) else dict(path="skinny", tile=way)
            norm = RowNorm(made.mixer.gate_norm.weight, 1e-5)
            linear.linear_add(y, made.mixer.out_proj.weight, None, x, norm=norm, out_scale=1e-3, **how)

        some = ways if batch <= 8 else ways[:3] if batch <= 32 else ways[:1]
        yield Sweep(f"norm + in_proj, batch {batch}", (*some, "cublas"), enter, 2 * E * D / BYTES_PER_S,
                    partial(keep_way, batch, 0))
        yield Sweep(f"norm + out_proj, batch {batch}", (*some, "cublas", "cublas_rounded"), leave,
                    2 * I * D / BYTES_PER_S, partial(keep_way, batch, 1))
    for batch, slots in ((8, 4097), (64, 2049)):
        yield attention_sweep(batch, slots)


def mixer_sweep(layers: list[Any], batch: int, dtype: torch.dtype, candidates: tuple[Scan, ...]) -> Sweep:
    zx = torch.randn(batch, layers[0].mixer.in_proj.weight.shape[0], device="cuda", dtype=torch.bfloat16)
    f, states = layers[0].mixer.f, {id(made): mamba_state(batch, dtype, made) for made in layers}

    def mix(made: Any, way: tuple[Scan, bool]) -> None:
        m, state, xbc = made.mixer, states[id(made)], None
        if way[1]:
            shift = Shift(zx, state["conv"], f.heads * f.head_dim, f.groups * f.d_state)
            xbc = convolve(shift, m.conv.weight, m.conv.bias)
        mixer.mix(zx, state["conv"], state["ssm"], conv_weight_CK=m.conv.weight, conv_bias_C=m.conv.bias,
                  dt_bias_H=m.dt_bias, A_log_H=m.A_log, D_H=m.D, tile=way[0], xbc_BC=xbc)

    def found(way: tuple[Scan, bool]) -> None:
        configs.MIXER[dtype.itemsize] = set_row(configs.MIXER[dtype.itemsize], batch, way[0])
        inside = batch <= steps.MOST_CONVOLVED_INSIDE
        if dtype == torch.bfloat16 and way[1] == inside:
            steps.MOST_CONVOLVED_INSIDE = batch // 2 if inside else batch

    ways = [(scan, True) for scan in candidates] + [(candidates[0], False)]
    moved = 2 * sum(t.numel() * t.element_size() for t in states[id(layers[0])].values())
    name = f"mixer (convolution apart?), batch {batch}, {str(dtype)[6:]}"
    return Sweep(name, tuple(ways), mix, moved / BYTES_PER_S, found)


def keep_way(batch: int, end: int, way: Any) -> None:
    pair = list(configs.paths_for(batch))
    pair[end] = way if isinstance(way, str) else "skinny"
    configs.PATHS = set_row(configs.PATHS, batch, tuple(pair))
    if not isinstance(way, str) and end == 0:
        linear.SKINNY = set_row(linear.SKINNY, batch, way)


def attention_sweep(batch: int, slots: int) -> Sweep:
    made = layer("attention", heads=16, kv_heads=8, head_dim=128)
    states = [attention_state(batch, slots, slots - 100, made) for _ in range(4)]
    qkv = torch.randn(batch, 32 * 128, device="cuda", dtype=torch.bfloat16)
    position, turn = torch.full((batch,), slots - 100, device="cuda"), iter(range(1 << 60))

    def work(_: Any, way: tuple[int, Tile]) -> None:
        state = states[next(turn) % len(states)]
        attend(qkv, state["k"], state["v"], state["used"], position, scale=0.1, splits=way[0], tile=way[1])

    splits = (4, 6, 8, 12) if batch == 8 else (1, 2, 3)
    ways = [(n, Tile(64, warps=4)) for n in splits] + [(splits[1], t) for t in (Tile(64, warps=4, stages=4),
            Tile(32, warps=4, stages=4), Tile(128, warps=4, stages=2), Tile(64, warps=2))]
    moved = 2 * batch * slots * 8 * 128 * 2
    return Sweep(f"attention (splits, tile), batch {batch}, {slots} keys", tuple(ways), work, moved / BYTES_PER_S)


def compile_ahead(sweep: Sweep, made: Any) -> None:
    """Compiles a sweep's kernels side by side, launching none."""
    launch = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **how: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **how)

    with ThreadPoolExecutor(16) as pool, patch.object(JITFunction, "run", only_compile):
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            for candidate in sweep.candidates:
                # What cannot work says so where it is measured.
                with suppress(Exception):
                    sweep.work(made, candidate)


def tune(limits: Limits) -> None:
    """Best configuration of each kernel by batch, many layers' worth of weights in one graph (more than the cache)."""
    layers = [layer("mamba2") for _ in range(12)]

    def measure(sweep: Sweep) -> dict[str, Any]:
        times, errors = {}, []
        compile_ahead(sweep, layers[0])
        for candidate in sweep.candidates:
            try:
                graph = captured(lambda: [sweep.work(made, candidate) for made in layers])
                times[candidate] = microseconds(graph, repeats=5) / len(layers)
            except Exception as error:  # noqa: BLE001
                errors.append(f"{candidate}: {type(error).__name__} {str(error)[:80]}")
        order = sorted(times, key=times.__getitem__)
        if order:
            sweep.found(order[0])
        text = " | ".join(f"{times[c]:.1f} {brief(c)}" for c in order)
        return dict(floor_us=sweep.floor * 1e6, us=text, **({"errors": errors[:2]} if errors else {}))

    for sweep in sweeps(layers):
        if limits.over(0.55):
            print(f"stopped before {sweep.name}")
            break
        row(sweep.name, lambda: measure(sweep))
        gc.collect()
        torch.cuda.empty_cache()


def brief(candidate: Any) -> str:
    if isinstance(candidate, tuple):
        return "(" + " ".join(map(brief, candidate)) + ")"
    return str(astuple(candidate)).replace(" ", "") if hasattr(candidate, "rows") else str(candidate)
