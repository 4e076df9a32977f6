"""Our training kernels against mamba_ssm's, Liger's and torch.compile's, on this machine's GPU.

    python benchmarks/kernels.py [--json] [--only conv] [--tune] [--runs 20]

Shapes: mamba2-1.3b and a 1.7 B hybrid, bfloat16, 2 x 4096 tokens. Every row is first held to the float32 reference,
then timed: the median of single runs between CUDA events, with the L2 cache overwritten before each. GB/s counts
what the operation must read and write at least, and is also given as a share of a large copy's, measured in the same
run; the loss's rows give TFLOP/s of its three matrix products. A rival that is missing or fails says so in its row.

--tune: times our kernels in many launches instead and prints the best ones, for the tables in `mambadsl/parts/triton`.
Exit 2 without a GPU, 1 where a result of ours is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from kernel_launches import tune

TOKENS, D_MODEL, D_INNER, D_IN_PROJ = 8192, 2048, 4096, 8512
VOCABS = (50288, 65536)
#: Relative error (of norms) that bfloat16 results may have against float32 ones.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    """One operation: what each contender calls (made when it is reached), and what it costs at least."""

    name: str
    contenders: dict[str, Callable[[], Callable[[], tuple]]]
    truth: Callable[[], tuple]
    bytes: float = 0.0
    flops: float = 0.0


def timed(run: Callable[[], Any], *, runs: int) -> float:
    """Median milliseconds of single runs. The GPU is held up first, so that the host is ahead of it."""
    import torch

    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def gate_norm_cases(device: str, tokens: int = TOKENS) -> Iterator[Case]:
    import torch

    from mambadsl.kinds.mamba2.module import gate_norm as definition
    from mambadsl.parts.triton.gate_norm_kernels import gate_norm_backward, gate_norm_forward

    I, eps = D_INNER, 1e-5
    wide = torch.randn(tokens, D_IN_PROJ, device=device, dtype=torch.bfloat16)
    dwide, z = torch.empty_like(wide), wide[:, :I]
    y, dout = (torch.randn(tokens, I, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(I, device=device, dtype=torch.bfloat16) + 0.5

    def theirs(groups: int) -> tuple[Callable, Callable]:
        from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_bwd, _layer_norm_fwd

        how = dict(z=z, group_size=I // groups, norm_before_gate=False, is_rms_norm=True)
        _, _, rstd = _layer_norm_fwd(y, weight, None, eps, **how)
        forward = lambda: _layer_norm_fwd(y, weight, None, eps, **how)[:1]  # noqa: E731

        def backward():
            dy, dweight, _, dz = _layer_norm_bwd(
                dout, y, weight, None, eps, None, rstd, dz=dwide[:, :I], **how
            )[:4]
            return dy, dz, dweight

        return forward, backward

    def compiled(groups: int) -> tuple[Callable, Callable]:
        leaves = [t.detach().requires_grad_() for t in (y, z, weight)]
        run = torch.compile(lambda: definition(*leaves, order="after_gate", groups=groups, eps=eps))
        out = run()
        return lambda: (run(),), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    for groups in (1, 8):
        how = dict(order="after_gate", groups=groups, eps=eps)
        leaves = [t.float().requires_grad_() for t in (y, z, weight)]
        out = definition(*leaves, **how)
        grads = torch.autograd.grad(out, leaves, dout.float())
        _, rstd = gate_norm_forward(y, z, weight, **how)
        yield Case(
            f"gate_norm forward, {groups} group(s)",
            {
                "mambadsl": lambda how=how: lambda: gate_norm_forward(y, z, weight, **how)[:1],
                "mamba_ssm": lambda groups=groups: theirs(groups)[0],
                "torch.compile": lambda groups=groups: compiled(groups)[0],
            },
            lambda out=out: (out,), bytes=3 * y.nbytes,
        )
        yield Case(
            f"gate_norm backward, {groups} group(s)",
            {
                "mambadsl": lambda how=how, rstd=rstd: lambda: gate_norm_backward(
                    dout, y, z, weight, rstd, dz=dwide[:, :I], **how
                ),
                "mamba_ssm": lambda groups=groups: theirs(groups)[1],
                "torch.compile": lambda groups=groups: compiled(groups)[1],
            },
            lambda grads=grads: grads, bytes=5 * y.nbytes,
        )


def conv_cases(device: str, time: int = 4096) -> Iterator[Case]:
    """Rows of the layers' buffers: z, then the convolution's channels, then the step sizes."""
    import torch

    from mambadsl.kinds.conv import causal_conv as definition
    from mambadsl.parts.triton import conv as ours

    def theirs(run: str, *args: Any, **how: Any) -> Callable[[], tuple]:
        from mambadsl.parts.causal_conv1d import kernels

        kernels.extension()
        return lambda: getattr(kernels, run)(*args, **how)

    for (C, width), packed in itertools.product(((4352, D_IN_PROJ), (6144, 10304)), (False, True)):
        wide, dy = (torch.randn(2, time, n, device=device, dtype=torch.bfloat16) for n in (width, C))
        dwide, x = torch.empty_like(wide), wide[..., D_INNER : D_INNER + C]
        weight, bias = (torch.randn(C, *k, device=device, dtype=torch.bfloat16) for k in ((4,), ()))
        index_T = torch.arange(time, device=device)
        document_BT = (index_T // 700).int().expand(2, time).contiguous() if packed else None
        leaves = [t.float().requires_grad_() for t in (x, weight, bias)]
        y, _ = definition(*leaves, segments_BT=document_BT, lengths_B=torch.full((2,), time, device=device))
        dx, dweight, dbias = torch.autograd.grad(y, leaves, dy.float())
        how = dict(document_BT=document_BT)
        into = how | dict(dx=dwide[..., D_INNER : D_INNER + C])
        name = f"{C} channels, {'documents' if packed else 'one document'}"
        yield Case(
            f"conv forward, {name}",
            {
                "mambadsl": lambda a=(x, weight, bias), how=how: lambda: (ours.forward(*a, **how),),
                "causal_conv1d": lambda a=(x, weight, bias), how=how: (
                    lambda run=theirs("forward", *a, **how): (run(),)
                ),
            },
            lambda y=y: (y.detach(),), bytes=2 * dy.nbytes,
        )
        yield Case(
            f"conv backward, {name}",
            {
                "mambadsl": lambda a=(dy, x, weight, bias), how=into: lambda: ours.backward(*a, **how)[:2],
                "causal_conv1d": lambda a=(dy, x, weight, bias), how=into: (
                    lambda run=theirs("backward", *a, **how): run()[:2]
                ),
            },
            lambda dx=dx, flat=torch.cat([dweight.flatten(), dbias]): (dx, flat), bytes=3 * dy.nbytes,
        )


def rms_norm_cases(device: str, tokens: int = TOKENS) -> Iterator[Case]:
    import torch

    from mambadsl.kinds.norm import rms_norm as definition
    from mambadsl.parts.triton.norm import rms_norm_backward, rms_norm_forward

    x, dout = (torch.randn(tokens, D_MODEL, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(D_MODEL, device=device, dtype=torch.bfloat16) + 0.5

    def autograd(function: Callable) -> tuple[Callable, Callable]:
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        out = function(*leaves)
        return lambda: (function(*leaves),), lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def liger() -> Callable:
        from liger_kernel.transformers.functional import liger_rms_norm

        return lambda x, w: liger_rms_norm(x, w, 1e-5, 0.0, "gemma", False)

    compiled = torch.compile(lambda x, w: definition(x, w, eps=1e-5))
    leaves = [x.float().requires_grad_(), weight.float().requires_grad_()]
    out = definition(*leaves, eps=1e-5)
    grads = torch.autograd.grad(out, leaves, dout.float())
    _, rstd = rms_norm_forward(x, weight, eps=1e-5)
    yield Case(
        "rms_norm forward",
        {
            "mambadsl": lambda: lambda: rms_norm_forward(x, weight, eps=1e-5)[:1],
            "liger": lambda: autograd(liger())[0], "torch.compile": lambda: autograd(compiled)[0],
            "torch": lambda: autograd(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5))[0],
        },
        lambda: (out,), bytes=2 * x.nbytes,
    )
    yield Case(
        "rms_norm backward",
        {
            "mambadsl": lambda: lambda: rms_norm_backward(dout, x, weight, rstd),
            "liger": lambda: autograd(liger())[1], "torch.compile": lambda: autograd(compiled)[1],
            "torch": lambda: autograd(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5))[1],
        },
        lambda: grads, bytes=3 * x.nbytes,
    )


def loss_cases(device: str, tokens: int = TOKENS, vocabs: tuple[int, ...] = VOCABS) -> Iterator[Case]:
    import torch
    import torch.nn.functional as F

    from mambadsl.parts.triton.cross_entropy import losses, make_loss

    def plain(x, w, targets):
        return F.cross_entropy(F.linear(x, w).float(), targets)

    for V in vocabs:
        x = torch.randn(tokens, D_MODEL, device=device, dtype=torch.bfloat16, requires_grad=True)
        w = (torch.randn(V, D_MODEL, device=device, dtype=torch.bfloat16) / D_MODEL**0.5).requires_grad_()
        targets = torch.randint(0, V, (tokens,), device=device)

        def step(loss: Callable, x=x, w=w, targets=targets) -> Callable[[], tuple]:
            def run():
                value = loss(x, w, targets)
                return value, *torch.autograd.grad(value, (x, w))

            return run

        def liger() -> Callable:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            return liger_fused_linear_cross_entropy

        def truth(x=x, w=w, targets=targets):
            leaves = [x.detach().float().requires_grad_(), w.detach().float().requires_grad_()]
            value = plain(*leaves, targets)
            return value, *torch.autograd.grad(value, leaves)

        yield Case(
            f"linear + loss, forward + backward, vocab {V}",
            {
                **{
                    f"mambadsl, {n} chunk(s)": lambda n=n, step=step: step(make_loss(chunks=n)) for n in (1, 2, 4)
                },
                "liger": lambda step=step: step(liger()),
                "torch.compile": lambda step=step: step(torch.compile(plain)),
                "torch": lambda step=step: step(plain),
            },
            truth, flops=3 * 2 * tokens * D_MODEL * V,
        )
        logits = torch.randn(tokens // 2, V, device=device, dtype=torch.bfloat16)
        scratch, losses_R = torch.empty_like(logits), torch.empty(tokens // 2, device=device)

        def rows(logits=logits, scratch=scratch, losses_R=losses_R, targets=targets[:tokens // 2]):
            losses(scratch, targets, losses_R)
            return losses_R, scratch

        def first(rows=rows, logits=logits, scratch=scratch):
            scratch.copy_(logits)
            rows()
            return rows  # Correct only on fresh logits, timed on any.

        yield Case(
            f"loss kernel alone, {tokens // 2} rows, vocab {V}", {"mambadsl": first},
            lambda: None, bytes=2 * logits.nbytes,
        )


CASES = {"gate_norm": gate_norm_cases, "conv": conv_cases, "rms_norm": rms_norm_cases, "loss": loss_cases}


def error(found: tuple, truth: tuple) -> float:
    """The largest relative error of norms over a contender's results."""
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-20)) for a, b in zip(found, truth))


def measure(case: Case, *, runs: int, bytes_per_s: float, timer: Callable = timed) -> Iterator[dict[str, Any]]:
    truth = case.truth()
    for name, make in case.contenders.items():
        row: dict[str, Any] = {"case": case.name, "by": name}
        try:
            run = make()
            if truth is not None:
                row["error"] = error(run(), truth)
                row["correct"] = row["error"] < TOLERANCE
            ms = row["ms"] = timer(run, runs=runs)
            if case.bytes:
                row |= {"GB/s": case.bytes / ms / 1e6, "of copy": case.bytes / ms * 1e3 / bytes_per_s}
            if case.flops:
                row["TFLOP/s"] = case.flops / ms / 1e9
        except Exception as failure:  # A row that fails must not end the others.
            row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:150]
        yield row


def copy_speed(device: str, *, runs: int, timer: Callable = timed, size: int = 2**30) -> float:
    """Bytes a second of a large copy, what is read and written together."""
    import torch

    a, b = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / timer(lambda: b.copy_(a), runs=runs) * 1e3


def text(row: dict[str, Any]) -> str:
    shown = [f"{row['case']:<48}", f"{row.get('by', ''):<22}", f"{row['ms'] * 1e3:9.1f} us" if "ms" in row else ""]
    shown += [f"{row[unit]:7.0f} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in row]
    shown += [f"{row['of copy']:5.0%} of a copy"] if "of copy" in row else []
    shown += [f"error {row['error']:.1e}"] if "error" in row else []
    shown += ["WRONG"] if row.get("correct") is False else []
    return " ".join([*shown, row.get("failed", ""), str(row.get("launch", ""))]).rstrip()


def require_gpu(script: str) -> None:
    """Exit 2 where torch or a GPU that it can use is missing."""
    try:
        import torch
        has_gpu = torch.cuda.is_available()
    except ImportError:
        has_gpu = False
    if not has_gpu:
        print(f"benchmarks/{script} needs a GPU that torch can use; there is none here", file=sys.stderr)
        raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--only", choices=sorted(CASES), help="one operation's rows")
    parser.add_argument("--tune", action="store_true", help="the best launches of our kernels, no rivals")
    parser.add_argument("--runs", type=int, default=20)
    asked = parser.parse_args()
    require_gpu("kernels.py")
    import torch

    bytes_per_s = copy_speed("cuda", runs=asked.runs)
    rows = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if not asked.json:
            print(text(row), flush=True)

    if asked.tune:
        for row in tune("cuda", runs=asked.runs, timer=timed, only=asked.only):
            note(row)
    else:
        for name, cases in CASES.items():
            for case in cases("cuda") if asked.only in (None, name) else ():
                for row in measure(case, runs=asked.runs, bytes_per_s=bytes_per_s):
                    note(row)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": bytes_per_s / 1e9}
    print(json.dumps({**machine, "rows": rows}) if asked.json else machine)
    ours = [row for row in rows if row.get("by", "").startswith("mambadsl")]
    raise SystemExit(any(row.get("correct") is False or "failed" in row for row in ours))


if __name__ == "__main__":
    main()
