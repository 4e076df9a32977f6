"""The launches that `kernels.py --tune` tries: rows with the best ones of each of our training kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def tune(device: str, *, runs: int, timer: Callable, blocks: tuple[int, ...] = (512, 2048, 4096),
         keep: int = 3, limit: int | None = None, only: str | None = None) -> Iterator[dict[str, Any]]:
    """The best launches of each kernel and block, at 2**25 elements; `only`: of those whose name begins so."""
    import torch

    from mambadsl.parts.triton import cross_entropy, gate_norm_kernels, norm
    from mambadsl.parts.triton.launch import Launch

    def best(name: str, launches: list, run: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
        if only is not None and not name.startswith(only):
            return
        found = []
        if device == "cuda":  # Compiling takes longer than all the measuring.
            with ThreadPoolExecutor(8, initializer=lambda: torch.cuda.set_device(0)) as pool:
                for started in [pool.submit(run, launch) for launch in launches[:limit]]:
                    started.exception()
        for launch in launches[:limit]:
            try:
                found.append((timer(lambda: run(launch), runs=runs), launch))
            except Exception as failure:  # Too many registers or too much shared memory: the others go on.
                yield {"case": name, "launch": _plain(launch), "failed": f"{type(failure).__name__}: {failure}"[:150]}
        for ms, launch in sorted(found, key=lambda pair: pair[0])[:keep]:
            yield {"case": name, "ms": ms, "launch": _plain(launch)}

    for block in blocks:
        I, R = block, 2**25 // block if device == "cuda" else 4
        y, z, dout = (torch.randn(R, I, device=device, dtype=torch.bfloat16) for _ in range(3))
        weight, how = torch.rand(I, device=device, dtype=torch.bfloat16), dict(order="after_gate", groups=1, eps=1e-5)
        _, rstd = gate_norm_kernels.gate_norm_forward(y, z, weight, **how)
        held = [rows for rows in (1, 2, 4, 8) if 512 <= rows * block <= 8192]
        warps = [w for w in (2, 4, 8, 16) if 4 <= block // (32 * w) or w == 2]
        forwards = [Launch(r, w) for r, w in itertools.product(held, warps) if 4 <= r * block // (32 * w) <= 32]
        backwards = [
            Launch(r, w, s, p, 65536 // (32 * w * p) // 8 * 8 if 65536 // (32 * w * p) < 256 else None)
            for r, w, s, p in itertools.product(held, warps, (1, 3), (1, 2, 3, 4, 5, 6))
            if 4 <= r * block // (32 * w) <= 16 and 16 <= w * p <= 24
        ]
        yield from best(f"gate_norm forward, {block}", forwards, lambda launch: gate_norm_kernels.gate_norm_forward(
            y, z, weight, launch=launch, **how))
        yield from best(f"gate_norm backward, {block}", backwards, lambda launch: gate_norm_kernels.gate_norm_backward(
            dout, y, z, weight, rstd, launch=launch, **how))
        yield from best(f"rms_norm forward, {block}", forwards, lambda launch: norm.rms_norm_forward(
            y, weight, eps=1e-5, launch=launch))
        yield from best(f"rms_norm backward, {block}", backwards, lambda launch: norm.rms_norm_backward(
            dout, y, weight, rstd[:, 0], launch=launch))
    yield from conv_launches(device, best)
    R, V = (4096, 65536) if device == "cuda" else (2, 9000)
    logits = torch.randn(R, V, device=device, dtype=torch.bfloat16)
    targets, losses_R = torch.randint(0, V, (R,), device=device), torch.empty(R, device=device)
    launches = [
        dict(BLOCK=b, STAGES=s, num_warps=w, maxnreg=r)
        for b, s, w, r in itertools.product((4096, 8192, 16384), (1, 2, 3), (8, 16, 32), (64, 128))
        if 8 <= b // (32 * w) <= 32 and w * r <= 2048
    ]
    yield from best("loss kernel", launches, lambda launch: cross_entropy.losses(
        logits, targets, losses_R, launch=launch))


def conv_launches(device: str, best: Callable[..., Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Both widths of convolution: programs of one warp for each segment, with 4 or 8 channels a thread. Asking ahead
    for rows takes registers, so that fewer programs fit."""
    import torch

    from mambadsl.parts.triton import conv

    def walks(rows: tuple[int, ...], registers: dict[tuple[int, bool], tuple[int, ...]]) -> list:
        """registers: of a thread, by the channels of a program and whether it asks ahead."""
        return [
            conv.Walk(channels, lanes, r, lanes, waves * (65536 // (32 * lanes * most)), most, ahead)
            for (channels, ahead), each in registers.items()
            for most, lanes, r, waves in itertools.product(each, (1, 4), rows, (1, 2))
        ]

    for C, width in ((4352, 8512), (6144, 10304)):
        T = 4096 if device == "cuda" else 4
        wide, dy = (torch.randn(2, T, n, device=device, dtype=torch.bfloat16) for n in (width, C))
        dwide, x, xs = torch.empty_like(wide), wide[..., 4096 : 4096 + C], slice(4096, 4096 + C)
        weight, bias = (torch.randn(C, *k, device=device, dtype=torch.bfloat16) for k in ((4,), ()))
        yield from best(
            f"conv forward, {C} channels", walks(
                (4, 8), {(128, False): (72,), (128, True): (80, 96), (256, False): (128,)}),
            lambda walk: conv.forward(x, weight, bias, walk=walk),
        )
        yield from best(
            f"conv backward, {C} channels", walks(
                (2, 4, 8), {(128, False): (128, 168), (128, True): (128, 168)}),
            lambda walk: conv.backward(dy, x, weight, bias, dx=dwide[..., xs], walk=walk),
        )


def _plain(launch: Any) -> dict[str, int]:
    return launch if isinstance(launch, dict) else launch._asdict()
