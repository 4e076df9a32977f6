"""Our SSD kernels against mamba_ssm's, on this machine's GPU.

    python benchmarks/ssd.py [--json] [--ours] [--tune] [--chunks 128] [--groups 1] [--only dx scan] [--runs 20]

Shapes: mamba2-1.3b's scan, bfloat16, 2 x 4096 tokens. First each side's whole forward and backward are held to
autograd in float32; then each kernel is timed against the launcher of mamba_ssm that does the same work: medians of
single runs between CUDA events, with the L2 cache overwritten before each. GB/s: what the work must read and write at
least. Ours come first: mamba_ssm's kernels tune themselves for up to a minute when they are first called.

--ours: without mamba_ssm. --tune: times our kernels in many launches instead and prints the best ones. Exit 2 without
a GPU, 1 where a result of ours is wrong or missing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kernels import TOLERANCE, copy_speed, require_gpu, text, timed
from ssd_launches import first_line, tune


@dataclass(frozen=True)
class Sizes:
    B: int = 2
    T: int = 4096
    H: int = 64
    P: int = 64
    N: int = 128


@dataclass(frozen=True)
class Work:
    """The tensors of a scan with chunks of Q tokens and G groups, on `device`."""

    s: Sizes
    G: int
    Q: int
    device: str
    documents: bool = False

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """x, B, C, step [B, T, H], log decay [B, T, H], D; x, B and C in the dtype that is scanned."""
        import torch

        s, G = self.s, self.G
        g = torch.Generator(self.device).manual_seed(0)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        made = dict(device=self.device, generator=g)
        xbc = torch.randn(s.B, s.T, s.H * s.P + 2 * G * s.N, **made).to(dtype)
        x, B, C = xbc.split([s.H * s.P, G * s.N, G * s.N], -1)
        step = 0.1 * torch.rand(s.B, s.T, s.H, **made)
        rate = 1 + 15 * torch.rand(s.H, **made)
        return dict(
            x=x.unflatten(-1, (s.H, s.P)), B=B.unflatten(-1, (G, s.N)), C=C.unflatten(-1, (G, s.N)), step=step,
            log=-step * rate, D=torch.randn(s.H, **made),
        )

    @functools.cached_property
    def dy(self) -> Any:
        import torch

        g = torch.Generator(self.device).manual_seed(1)
        x = self.leaves["x"]
        return torch.randn(x.shape, device=self.device, generator=g).to(x.dtype)

    @functools.cached_property
    def document_BT(self) -> Any:
        import torch

        if not self.documents:
            return None
        ends = torch.rand(self.s.B, self.s.T, device=self.device, generator=torch.Generator(self.device).manual_seed(2))
        return (ends < 4 / self.s.T).cumsum(1, dtype=torch.int32) - (ends[:, :1] < 4 / self.s.T).int()

    @functools.cached_property
    def ours(self) -> Any:
        from mambadsl.kinds.chunks import in_chunks
        from mambadsl.parts.triton.ssd.scan import Inputs

        v = self.leaves
        step, log = (in_chunks(v[n], self.Q).transpose(2, 3).contiguous() for n in ("step", "log"))
        return Inputs(v["x"], v["B"], v["C"], step, log.cumsum(-1), v["D"], self.document_BT)

    @functools.cached_property
    def theirs(self) -> Any:
        from mambadsl.parts.mamba_ssm.ssd import Inputs

        i = self.ours
        return Inputs(
            i.x_BTHP, i.B_BTGN, i.C_BTGN, i.step_BcHQ.transpose(1, 2), i.decay_BcHQ.transpose(1, 2), i.D_H,
            i.document_BT,
        )

    def outputs(self) -> dict[str, Any]:
        """Where dx, dB and dC go: columns of one buffer."""
        import torch

        v = self.leaves
        rows = [v[n].flatten(2) for n in ("x", "B", "C")]
        out = torch.empty_like(torch.cat(rows, -1)).split([r.shape[-1] for r in rows], -1)
        return {f"d{n}": o.unflatten(-1, v[n].shape[2:]) for n, o in zip(("x", "B", "C"), out)}


def truth(work: Work) -> dict[str, Any]:
    """y and the gradients of all leaves: autograd in float32 through chunks of 64."""
    import torch

    from mambadsl.kinds.chunks import in_chunks

    leaves = {n: v.detach().float().requires_grad_() for n, v in work.leaves.items()}
    ratio, Q = work.s.H // work.G, 64
    x, step, log = (in_chunks(leaves[n], Q) for n in ("x", "step", "log"))
    B, C = (in_chunks(leaves[n], Q).repeat_interleave(ratio, 3) for n in "BC")
    document = work.document_BT
    document = torch.zeros(x.shape[0], x.shape[1] * Q, device=x.device) if document is None else document
    mine = in_chunks(document[..., None], Q)[..., 0]
    a = log.cumsum(2)
    ys, state = [], torch.zeros(x.shape[0], work.s.H, work.s.P, work.s.N, device=x.device)
    lower, before = torch.ones(Q, Q, device=x.device).tril().bool(), torch.zeros_like(mine[:, 0, 0])
    for c in range(x.shape[1]):
        a_c, document_c = a[:, c], mine[:, c]
        sees = lower & (document_c[:, :, None] == document_c[:, None])
        gap = (a_c[:, :, None] - a_c[:, None]).masked_fill(~sees[..., None], float("-inf"))
        weight = torch.einsum("bihn,bjhn->bijh", C[:, c], B[:, c]) * gap.exp()
        scaled = x[:, c] * step[:, c, ..., None]
        start = a_c.exp() * (document_c == before[:, None])[..., None]
        y = torch.einsum("bijh,bjhp->bihp", weight, scaled)
        ys.append(y + torch.einsum("bihn,bhpn,bih->bihp", C[:, c], state, start) + leaves["D"][:, None] * x[:, c])
        ends = document_c[:, min(Q, work.s.T - c * Q) - 1]
        to_end = (a_c[:, -1:] - a_c).exp() * (document_c == ends[:, None])[..., None]
        kept = a_c[:, -1].exp() * (ends == before)[:, None]
        state = state * kept[..., None, None] + torch.einsum("bjhp,bjhn,bjh->bhpn", scaled, B[:, c], to_end)
        before = ends
    y = torch.cat(ys, 1)[:, : work.s.T]
    grads = torch.autograd.grad(y, list(leaves.values()), work.dy.float())
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}


def _found(work: Work, y: Any, parts: Any, outs: dict[str, Any]) -> dict[str, Any]:
    """What `truth` gives, from a scan's results."""
    after, sums = parts.after.sum(0), parts.before.sum(0)
    after[..., 0] = 0
    log = after.cumsum(-1) + sums.flip(-1).cumsum(-1).flip(-1) + parts.across.sum(-1)[..., None]
    if parts.inside is not None:
        log = log + parts.inside.sum(0)
    step, log = (t.transpose(2, 3).flatten(1, 2)[:, : work.s.T] for t in (parts.step.sum(0), log))
    return {"y": y, **outs, "dstep": step, "dlog": log, "dD": parts.D.sum((0, 1, 2))}


def our_results(work: Work) -> dict[str, Any]:
    from mambadsl.parts.triton.ssd import scan

    y, _, before = scan.forward(work.ours, last=False)
    outs = work.outputs()
    parts, _ = scan.backward(work.ours, work.dy, before, **outs)
    return _found(work, y, parts, outs)


def their_results(work: Work) -> dict[str, Any]:
    from mambadsl.parts.mamba_ssm import ssd

    y, _, before, scores = ssd.forward(work.theirs)
    outs = work.outputs()
    parts, _ = ssd.backward(work.theirs, work.dy, before, scores, **outs)
    return _found(work, y, parts, outs)


def our_kernels(work: Work) -> dict[str, tuple[Callable[..., Any], float]]:
    """By the work's name: a call that takes the launch's keywords, and the least megabytes it reads and writes."""
    from mambadsl.parts.triton.ssd import backward, forward, groups, scan, shape, states

    i, dy, outs = work.ours, work.dy, work.outputs()
    before, _ = scan.states_before(i, last=False)
    dbefore = states.chunk_states(dy, i.C_BTGN, i.decay_BcHQ, None, i.document_BT)
    # Both passes write over what they read: here again and again over the same numbers, which takes as long.
    scratch, dscratch = before.clone(), dbefore.clone()
    dafter = states.pass_states_backward(
        dbefore.clone(), before, i.decay_BcHQ, None, i.document_BT, first=False
    )[0]
    shared = i.x_BTHP, i.step_BcHQ, i.decay_BcHQ, i.B_BTGN, i.C_BTGN
    da = i.step_BcHQ.new_empty(2, *i.step_BcHQ.shape)

    def scores(loop: shape.Loop = backward.SCORES) -> Any:
        R = shape.tiles(i.step_BcHQ.shape[3], loop)
        return backward.scores_backward(*shared, dy, i.document_BT, da=da[:R], loop=loop)

    dscores, _ = scores()
    x_mb, state_mb = dy.nbytes / 1e6, before.nbytes / 1e6
    return {
        "states": (lambda **o: states.chunk_states(
            i.x_BTHP, i.B_BTGN, i.decay_BcHQ, i.step_BcHQ, i.document_BT, **o), x_mb + state_mb),
        "pass": (lambda **o: states.pass_states(
            scratch, i.decay_BcHQ, None, i.document_BT, last=False, **o), 2 * state_mb),
        "scan": (lambda **o: forward.scan_forward(*shared, before, i.D_H, i.document_BT, **o), 2 * x_mb + state_mb),
        "forward": (lambda **o: scan.forward(i, last=False), 3 * x_mb + 4 * state_mb),
        "dstates": (lambda **o: states.chunk_states(dy, i.C_BTGN, i.decay_BcHQ, None, i.document_BT, **o),
                    x_mb + state_mb),
        "pass backward": (lambda **o: states.pass_states_backward(
            dscratch, before, i.decay_BcHQ, None, i.document_BT, first=False, **o), 3 * state_mb),
        "dx": (lambda **o: backward.inputs_backward(
            *shared, dafter, dy, i.D_H, i.document_BT, dx=outs["dx"], **o), 3 * x_mb + state_mb),
        "dscores": (scores, 2 * x_mb),
        "dB": (lambda **o: groups.add_up(groups.groups_backward(
            i.x_BTHP, dafter, None, i.C_BTGN, dscores, i.decay_BcHQ, i.step_BcHQ, i.document_BT, out=outs["dB"], **o)),
            x_mb + state_mb),
        "dC": (lambda **o: groups.add_up(groups.groups_backward(
            dy, before, i.C_BTGN, i.B_BTGN, dscores, i.decay_BcHQ, None, i.document_BT, out=outs["dC"], da=da[0], **o)),
            x_mb + state_mb),
        "backward": (lambda **o: scan.backward(i, dy, before, **outs), 8 * x_mb + 7 * state_mb),
    }


def their_kernels(work: Work) -> dict[str, Callable[[], Any]]:
    import torch

    from mambadsl.parts.mamba_ssm import ssd
    from mambadsl.parts.mamba_ssm.load import triton_kernels

    k, i, dy, outs = triton_kernels(), work.theirs, work.dy, work.outputs()
    _, _, before, scores = ssd.forward(i)
    added = k.state._chunk_state_fwd(
        i.B_BTGN, i.x_BTHP, i.step_BHcQ, i.decay_BHcQ, seq_idx=i.document_BT, states_in_fp32=True
    )
    dafter, _, _ = ssd._states_backward(i, dy, before, None, False)
    dscores = ssd._dscores(i, dy)

    def pairs():
        return ssd._dscores(i, dy), ssd._inside(i, dy, scores)

    return {
        "states": lambda: k.state._chunk_state_fwd(
            i.B_BTGN, i.x_BTHP, i.step_BHcQ, i.decay_BHcQ, seq_idx=i.document_BT, states_in_fp32=True),
        "pass": lambda: k.passing._state_passing_fwd(
            added.flatten(-2), i.decay_BHcQ[..., -1], seq_idx=i.document_BT, chunk_size=work.Q,
            out_dtype=i.x_BTHP.dtype),
        "scan": lambda: k.scan._chunk_scan_fwd(
            ssd.chunk_scores(i), i.x_BTHP, i.step_BHcQ, i.decay_BHcQ, i.C_BTGN, before, D=i.D_H,
            seq_idx=i.document_BT),
        "forward": lambda: ssd.forward(i),
        "dstates": lambda: k.scan._chunk_scan_bwd_dstates(
            i.C_BTGN, i.decay_BHcQ, dy, seq_idx=i.document_BT, dtype=torch.float32),
        "pass backward (with dstates)": lambda: ssd._states_backward(i, dy, before, None, False),
        "dx": lambda: ssd._dx(i, dy, scores, dafter, outs["dx"]),
        "dscores": pairs,
        "dB": lambda: k.bmm._bmm_chunk_bwd(i.C_BTGN, dscores, residual=ssd._db(i, dafter)[0], out=outs["dB"]),
        "dC": lambda: k.bmm._bmm_chunk_bwd(
            i.B_BTGN, dscores.transpose(-1, -2), residual=ssd._dc(i, dy, before)[0], out=outs["dC"]),
        "backward": lambda: ssd.backward(i, dy, before, scores, **outs),
    }


def _case(name: str, work: Work) -> str:
    return f"{name}, chunk {work.Q}, {work.G} group(s)" + (", documents" if work.documents else "")


def check(work: Work, by: str, results: Callable, expected: dict[str, Any]) -> dict[str, Any]:
    """The largest relative error of norms, and each tensor's."""
    row: dict[str, Any] = {"case": _case("results", work), "by": by}
    try:
        found = results(work)
        errors = {n: float((found[n].float() - t).norm() / t.norm().clamp_min(1e-20)) for n, t in expected.items()}
        row |= {"error": max(errors.values()), "correct": max(errors.values()) < TOLERANCE}
        row["launch"] = {n: float(f"{e:.1e}") for n, e in errors.items()}
    except Exception as failure:  # A row that fails must not end the others.
        row["failed"] = first_line(failure)
    return row


def measure(work: Work, by: str, kernels: dict[str, Any], *, only: list[str] | None, runs: int, bytes_per_s: float,
            timer: Callable = timed) -> Iterator[dict[str, Any]]:
    for name, kernel in kernels.items():
        if only is not None and name not in only:
            continue
        run, mb = kernel if isinstance(kernel, tuple) else (kernel, 0.0)
        row: dict[str, Any] = {"case": _case(name, work), "by": by}
        try:
            ms = row["ms"] = timer(run, runs=runs)
            if mb:
                row |= {"GB/s": mb / ms, "of copy": mb / ms * 1e9 / bytes_per_s}
        except Exception as failure:  # As above.
            row["failed"] = first_line(failure)
        yield row


def rows_of(asked: argparse.Namespace, *, device: str, sizes: Sizes, bytes_per_s: float, timer: Callable = timed,
            limit: int | None = None) -> Iterator[dict[str, Any]]:
    works = [Work(sizes, G, Q, device) for G in asked.groups for Q in asked.chunks]
    timing = dict(only=asked.only, runs=asked.runs, timer=timer)
    if asked.tune:
        for work in works:
            case = functools.partial(_case, work=work)
            yield from tune(our_kernels(work), case=case, device=work.device, limit=limit, **timing)
        return
    sides = [("mambadsl", our_results, our_kernels)]
    if not asked.ours:
        sides.append(("mamba_ssm", their_results, their_kernels))
    for by, results, kernels in sides:
        for G in asked.groups:
            expected = {d: truth(Work(sizes, G, asked.chunks[0], device, d)) for d in (False, True)}
            for Q, documents in itertools.product(asked.chunks, expected):
                yield check(Work(sizes, G, Q, device, documents), by, results, expected[documents])
        for work in works:
            try:
                made = kernels(work)
            except Exception as failure:
                yield {"case": _case("all", work), "by": by, "failed": first_line(failure)}
                continue
            yield from measure(work, by, made, bytes_per_s=bytes_per_s, **timing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--ours", action="store_true", help="without mamba_ssm")
    parser.add_argument("--tune", action="store_true", help="the best launches of our kernels, no rivals")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--groups", type=int, nargs="+", help="1 and 8; to tune, 1")
    parser.add_argument("--only", nargs="+", help="rows of these: states, pass, scan, dstates, dx, dscores, dB, dC ...")
    parser.add_argument("--runs", type=int, default=20)
    asked = parser.parse_args()
    asked.groups = asked.groups or ([1] if asked.tune else [1, 8])
    require_gpu("ssd.py")
    import torch

    bytes_per_s = copy_speed("cuda", runs=asked.runs)
    rows = []
    for row in rows_of(asked, device="cuda", sizes=Sizes(), bytes_per_s=bytes_per_s):
        rows.append(row)
        if not asked.json:
            print(text(row), flush=True)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": bytes_per_s / 1e9}
    print(json.dumps({**machine, "rows": rows}, default=str) if asked.json else machine)
    ours = [row for row in rows if row.get("by") == "mambadsl"]
    raise SystemExit(any(row.get("correct") is False or "failed" in row for row in ours))


if __name__ == "__main__":
    main()
