"""The CUDA extensions of causal_conv1d and mamba_ssm, on the CPU: the same functions, arguments and demands.

Written from the extensions' signatures, with the kinds' definitions (or a loop) for the mathematics, so that what
is around the kernels can be tested without a GPU.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from torch import Tensor

from mambadsl.kinds.conv import causal_conv


def installed(monkeypatch, *modules: ModuleType) -> None:
    """As imports find them; a package comes before what is in it."""
    for made in modules:
        monkeypatch.setitem(sys.modules, made.__name__, made)
        owner, _, name = made.__name__.rpartition(".")
        if owner:
            monkeypatch.setattr(sys.modules[owner], name, made, raising=False)


def gradients(function, *inputs: Tensor | None, dout: Tensor) -> list[Tensor | None]:
    """Of each input (None for None). In a thread of its own: inside a custom op there is no autograd."""

    def work():
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
        given = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(function(*leaves), given, dout.detach()))
        return [None if t is None else next(grads) for t in leaves]

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def conv_results(conv, inputs, *, before: int, **rows) -> list[Tensor]:
    """y, the state, and the gradients of a random combination of both. inputs: rows, whose channels begin after
    `before` others; weight, bias and state, of which the last two may be None."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    wide, weight, bias, state = leaves
    y, after = conv(wide[..., before : before + weight.shape[0]], weight, bias, state_BCJ=state, **rows)
    generator = torch.Generator().manual_seed(1)
    total = (y * torch.randn(y.shape, generator=generator)).sum()
    if after is not None:
        total = total + (after * torch.randn(after.shape, generator=generator)).sum()
    total.backward()
    return [y, *([] if after is None else [after]), *(t.grad for t in leaves if t is not None)]


class ConvExtension:
    """causal_conv1d_cuda. x [B, C, T]: channels innermost, strides in eights."""

    def causal_conv1d_fwd(self, x, weight, bias, document, initial, out, final, silu) -> None:
        self._demand(x, weight, bias, document, initial, silu)
        assert final is None and out.stride(1) == 1
        out.copy_(self._conv(x, weight, bias, document, initial))

    def causal_conv1d_bwd(
        self, x, weight, bias, dout, document, initial, dfinal, dx, dweight, dbias, dinitial, silu
    ) -> None:
        self._demand(x, weight, bias, document, initial, silu)
        assert dout.stride(1) == 1 and dx.stride(1) == 1 and dfinal is None
        assert (bias is None) == (dbias is None) and (initial is None) == (dinitial is None)
        assert dweight.dtype == torch.float32 and dx.dtype == x.dtype
        found = gradients(lambda x, w, b, i: self._conv(x, w, b, document, i), x, weight, bias, initial, dout=dout)
        dx.copy_(found[0])
        dweight.add_(found[1])
        if bias is not None:
            dbias.add_(found[2])
        if initial is not None:
            dinitial.copy_(found[3])

    @staticmethod
    def _demand(x, weight, bias, document, initial, silu) -> None:
        B, C, T = x.shape
        assert x.stride(1) == 1 and x.stride(2) > 1 and C % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        assert x.storage_offset() % 8 == 0 and weight.shape[0] == C and 2 <= weight.shape[1] <= 4 and silu
        assert bias is None or bias.dtype == weight.dtype
        assert document is None or initial is None, "documents and a state exclude each other"
        if document is not None:
            assert document.dtype == torch.int32 and document.is_contiguous() and document.shape == (B, T)
            assert (document >= 0).all()
        if initial is not None:
            assert initial.shape == (B, C, weight.shape[1] - 1) and initial.stride(1) == 1 and initial.dtype == x.dtype

    @staticmethod
    def _conv(x, weight, bias, document, initial) -> Tensor:
        y, _ = causal_conv(x.transpose(1, 2), weight, bias, segments_BT=document, state_BCJ=initial)
        return y.transpose(1, 2)


class SelectiveScanExtension:
    """selective_scan_cuda: no documents, no states; x [B, I, L] and the rest of one dtype."""

    @staticmethod
    def _scan(x, dt, A, B, C, D):
        h, ys = x.new_zeros(*x.shape[:2], A.shape[1]), []
        for t in range(x.shape[2]):
            h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * x[:, :, t])[..., None] * B[:, :, :, t]
            ys.append((h * C[:, :, :, t]).sum(-1) + D * x[:, :, t])
        return torch.stack(ys, -1)

    def fwd(self, x, dt, A, B, C, D, z, bias, softplus):
        assert z is None and bias is None and not softplus and B.shape[1] == 1
        assert x.dtype == dt.dtype == B.dtype == C.dtype and A.dtype == D.dtype == torch.float32
        assert x.stride(-1) == dt.stride(-1) == B.stride(-1) == C.stride(-1) == 1
        blocks = (x.shape[2] + 2047) // 2048
        return [self._scan(x, dt, A, B, C, D), x.new_zeros(*x.shape[:2], blocks, 2 * A.shape[1])]

    def bwd(self, x, dt, A, B, C, D, z, bias, dout, states, out, dz, softplus, recompute):
        assert dout.dtype == x.dtype and dout.stride(-1) == 1 and states.is_contiguous() and not recompute
        return [*gradients(self._scan, x, dt, A, B, C, D, dout=dout), None]
