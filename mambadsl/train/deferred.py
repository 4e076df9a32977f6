"""Gradients of projections' weights, put off: what fills a pipeline's bubbles in `zb` and `zbv`.

A backward pass through a deferred projection gives the gradient of its input at once and notes the rest. What is noted
for a microbatch is done later, as an action of its own. Everything else (scans, convolutions, norms, the head) has its
gradients at once: fused kernels compute all of theirs together, and would run twice if autograd split them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.build.model import Model


class Deferred:
    """Of one stage. waiting: (weight, bias, input, gradient) of each projection, since the last `take`."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """In place of F.linear."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x, weight, bias)
        return _Linear.apply(x, weight, bias, self)

    # torch.compile goes around it, for what is noted is no tensor of a graph.
    linear.waits = True

    def take(self) -> Callable[[], None]:
        """What is waiting, as something to do later; `dw_builder` of a stage."""
        noted, self.waiting = self.waiting, []

        @torch.no_grad()
        def run() -> None:
            while noted:
                weight, bias, x, dy = noted.pop()
                _add(weight, dy.T @ x)
                if bias is not None:
                    _add(bias, dy.sum(0))

        return run


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(x)
        # The parameters themselves: saved ones come back without their `grad` where a layer is recomputed.
        ctx.weight, ctx.bias, ctx.deferred = weight, bias, deferred
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.deferred.waiting.append((ctx.weight, ctx.bias, x.flatten(0, -2), dy.flatten(0, -2)))
        return dy @ ctx.weight if ctx.needs_input_grad[0] else None, None, None, None


def _add(parameter: Tensor, grad: Tensor) -> None:
    grad = grad.to(parameter.dtype)
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def defer(model: Model) -> Deferred:
    """Puts off the weights of every projection that is plain F.linear."""
    deferred = Deferred()
    for _, sublayer in model.sublayers():
        for mixer in sublayer.mixer_modules():
            mixer.parts = {
                slot: deferred.linear if part is F.linear else part for slot, part in mixer.parts.items()
            }
    return deferred
