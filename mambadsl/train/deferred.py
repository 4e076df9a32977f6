"""Gradients of projections' weights, put off: what fills a pipeline's bubbles in `zb` and `zbv`.

A backward pass through a deferred projection gives the gradient of its input at once and notes the rest. What is noted
for a microbatch is done later, as an action of its own. Everything else (scans, convolutions, norms, the head) has its
gradients at once: fused kernels compute all of theirs together, and would run twice if autograd split them.

A projection is one op for torch.compile, with nothing of its layer in it: layers alike share one compilation. So notes
have addresses of weights, and whoever does them finds the parameters. Compiled layers use their memory again as soon as
they are done with it: there, notes have copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.build.model import Model

#: (address of the weight, of the bias or None, input, gradient of the output), since the last `Deferred.take`.
_noted: list[tuple[int, int | None, Tensor, Tensor]] = []


class Deferred:
    """Of one stage. Its notes are taken after each of its backward passes, before another stage's."""

    def __init__(self, model: Model):
        self.model = model

    def take(self) -> Callable[[], None]:
        """What is noted, as something to do later; `dw_builder` of a stage."""
        mine = _noted.copy()
        _noted.clear()

        @torch.no_grad()
        def run() -> None:
            found = {p.data_ptr(): p for p in self.model.parameters()}
            while mine:
                weight, bias, x, dy = mine.pop()
                _add(found[weight], dy.T @ x)
                if bias is not None:
                    _add(found[bias], dy.sum(0))

        return run


def _add(parameter: Tensor, grad: Tensor) -> None:
    grad = grad.to(parameter.dtype)
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def defer(model: Model, *, compiles: bool) -> Deferred:
    """Puts off the weights of every projection that is plain F.linear."""
    linear = _copied if compiles else _kept
    for _, sublayer in model.sublayers():
        for mixer in sublayer.mixer_modules():
            mixer.parts = {slot: linear if part is F.linear else part for slot, part in mixer.parts.items()}
    return Deferred(model)


def _kept(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, copies: bool = False) -> Tensor:
    """In place of F.linear."""
    # Without a gradient of x nobody would run what notes.
    if not (torch.is_grad_enabled() and weight.requires_grad and x.requires_grad):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias, copies)


_copied = partial(_kept, copies=True)


@torch.library.custom_op("mambadsl::deferred_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, copies: bool) -> Tensor:
    return F.linear(x, weight, bias)


@torch.library.custom_op("mambadsl::deferred_linear_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, copies: bool) -> Tensor:
    """The gradient of x; the rest is noted."""
    rows = [t.flatten(0, -2).clone() if copies else t.flatten(0, -2) for t in (x, dy)]
    _noted.append((weight.data_ptr(), None if bias is None else bias.data_ptr(), *rows))
    return dy @ weight


@_linear.register_fake
def _(x, weight, bias, copies):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_backward.register_fake
def _(dy, x, weight, bias, copies):
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.copies = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return _backward(dy, *ctx.saved_tensors, ctx.copies), None, None, None


_linear.register_autograd(_gradients, setup_context=_save)
