"""One training step: tokens -> the loss, and a gradient in every parameter's `grad`.

In: a whole Model. Out: `TrainStep`, to call once for each batch before any torch optimizer's `step`. Refuses
(ValueError) a CUDA graph without CUDA, of a batch unlike the one it was captured with, of recomputed layers with
dropout; (RuntimeError) weights that moved after the capture.

Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mambadsl.build.compiled import compiled, limits

#: Steps before the capture: kernels are tuned, plans and workspaces are made, all outside the graph.
WARM_UP = 3


class TrainStep:
    """Forward and backward of one batch.

    compile: each sublayer through torch.compile, whole (`fullgraph`) and for its very shapes; layers alike share one
    compilation. Embedding, head and loss stay as they are, and outside `step` the model runs as it did.
    backend: torch.compile's.

    graph: the step as one CUDA graph, captured at the first batch and replayed for every later one, without
    the host's launch costs. What holds then:

    - Batches have the first one's shapes, dtypes and keywords. They are copied into the graph's own buffers.
    - Gradients are the graph's own tensors and each replay overwrites them; `p.grad` is set to them again
      after each, so `zero_grad` in any form, clipping and scaling in place are fine. To keep gradients, clone.
    - Weights are read where they were: optimizers, `copy_` and `load_state_dict` write in place; after
      `model.to(...)` or `p.data = ...` a step raises RuntimeError, and `close` makes it capture anew.
    - Activations and gradients keep their memory (a private pool) between steps, until `close`.
    - Dropout draws new numbers in each replay, from torch's CUDA generator (the warm-up has drawn some already).
    - `model.train()` or `eval()`, autocast and the like count as they were at the capture.
    """

    def __init__(self, model: Any, *, compile: bool = False, graph: bool = False, backend: Any = "inductor"):
        if graph:
            _check_capturable(model)
        self.model, self.graph = model, graph
        self._captured: _Captured | None = None
        self._compiled = compiled(model, backend=backend) if compile else {}

    def step(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, segments: Tensor | None = None,
        valid: Tensor | None = None, positions: Tensor | None = None,
    ) -> Tensor:
        """The loss, a float32 scalar on the device without a graph behind it. Arguments as in `Model.loss`.

        Every parameter's `grad` is overwritten, nothing is added to it; None where the loss does not depend on it.
        """
        given = dict(targets_BT=targets_BT, segments=segments, valid=valid, positions=positions)
        batch = {"tokens_BT": tokens_BT, **{name: t for name, t in given.items() if t is not None}}
        if self.graph:
            if self._captured is None:
                self._captured = _Captured(self.model, batch, self._with_compiled)
            return self._captured.replay(batch)
        for p in self.model.parameters():
            p.grad = None
        with self._with_compiled():
            loss = self.model.loss(**batch)
        loss.backward()
        return loss.detach()

    def close(self) -> None:
        """Frees the CUDA graph, its memory, and the gradients that live in it. The next step captures anew."""
        if self._captured is not None:
            self._captured.release()
            self._captured = None

    @contextmanager
    def _with_compiled(self) -> Iterator[None]:
        """Sublayers run as compiled in here only: decoding between steps has other shapes each time."""
        if not self._compiled:
            yield
            return
        with torch._dynamo.config.patch(**limits(len(self._compiled))):
            for sublayer, forward in self._compiled.items():
                sublayer.forward = forward
            try:
                yield
            finally:
                for sublayer in self._compiled:
                    del sublayer.forward


class _Captured:
    """A CUDA graph of loss and gradients, and the tensors it reads and writes."""

    def __init__(self, model: Any, batch: dict[str, Tensor], context: Callable):
        device = next(model.parameters()).device
        self.inputs = {name: t.detach().to(device, copy=True) for name, t in batch.items()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.places = [p.data_ptr() for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        # One set for warm-up and capture: parts may keep something for each parameter that they have met.
        self.aliases = aliases_of(model)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), context():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    loss_and_gradients(model, self.aliases, self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream):
                self.loss, self.grads = loss_and_gradients(model, self.aliases, self.inputs)

    def replay(self, batch: dict[str, Tensor]) -> Tensor:
        if (mine := _told(self.inputs)) != (given := _told(batch)):
            raise ValueError(f"the graph is of a batch {mine}, not {given}: `close` captures anew")
        if self.places != [p.data_ptr() for p in self.parameters]:
            raise RuntimeError("weights moved after the graph was captured: it reads their old memory; `close` first")
        for name, tensor in self.inputs.items():
            tensor.copy_(batch[name], non_blocking=True)
        self.graph.replay()
        for p, grad in zip(self.parameters, self.grads):
            p.grad = grad
        # A copy: the next replay overwrites the graph's own loss.
        return self.loss.clone()

    def release(self) -> None:
        for p, grad in zip(self.parameters, self.grads):
            if p.grad is grad:
                p.grad = None
        self.loss = self.grads = None
        self.graph.reset()


def aliases_of(model: Any) -> dict[str, nn.Parameter]:
    """Parameters of their own over the memory of the model's, for those that want gradients.

    Autograd ties a parameter to the stream of the oldest graph alive that has it: with the model's own, a loss that
    somebody still holds would draw the default stream into a capture, and fail it.
    """
    return {name: nn.Parameter(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(
    model: Any, aliases: dict[str, nn.Parameter], batch: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and its gradient for each alias, dense and in memory of its own."""
    loss = functional_call(_Objective(model), {f"model.{name}": p for name, p in aliases.items()}, (), batch)
    grads = torch.autograd.grad(loss, list(aliases.values()), allow_unused=True)
    return loss.detach(), _dense(grads, list(aliases.values()))


class _Objective(nn.Module):
    """The loss as a forward pass, which is what `functional_call` calls."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model.loss(**batch)


def _dense(grads: tuple[Tensor | None, ...], parameters: list[Tensor]) -> list[Tensor | None]:
    """Gradients laid out as their parameters, no two over the same memory (clipping in place would scale both)."""
    seen: set[int] = set()
    dense: list[Tensor | None] = []
    for grad, p in zip(grads, parameters):
        if grad is not None:
            place = grad.untyped_storage().data_ptr()
            if grad.stride() != p.stride() or place in seen:
                grad = torch.empty_like(p).copy_(grad)
            seen.add(grad.untyped_storage().data_ptr())
        dense.append(grad)
    return dense


def _check_capturable(model: Any) -> None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"`graph` needs the model on a CUDA device, and it is on `{device}`")
    for node, sublayer in model.sublayers():
        if sublayer.sub.recompute and any(branch.branch.dropout for branch in sublayer.branches):
            why = "a CUDA graph cannot draw the same dropout again where a layer is recomputed"
            raise ValueError(f"{node.path}: {why}: leave out `recompute`, `dropout` or `graph`")


def _told(batch: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in batch.items())
