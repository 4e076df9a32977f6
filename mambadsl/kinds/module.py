"""The base of every kind's torch module: parameters made from the kind's own table, so names, shapes
and dtypes cannot drift from what costs, checkpoints and converters read.

A kind's `module.py` offers `class Module(KindModule)` with

    def forward(self, x_BTD, tokens, state=None) -> y_BTD

`state` is the layer's decoding state, a dict from `init_state`; forward reads what came before and
writes what comes after, for any T >= 1 (a prompt, a chunk of one, a single token). What the kind `takes` comes by
keyword; where it `gives` something, forward returns (y_BTD, {name: tensor}).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from mambadsl.kinds.kind import Dims, Kind, State, Weight
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.state import FixedState, Room
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


class Declared(nn.Module):
    """Parameters made from a table; those declared float32 stay so."""

    def declare(
        self, weights: tuple[Weight, ...], *, dtype: torch.dtype, device: Any = None, below: str = ""
    ) -> None:
        """As `add_weights`."""
        self._wide = tuple(w.name.removeprefix(below) for w in weights if w.fp32)
        add_weights(self, weights, dtype=dtype, device=device, below=below)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Declared:
        """`to`, `bfloat16`, `half` and the like leave weights declared float32 (and their gradients) so."""
        wide = [self.state_dict(keep_vars=True)[name] for name in self._wide]
        kept = {id(t) for weight in wide for t in (weight, weight.grad) if t is not None}

        def keep(tensor: Tensor) -> Tensor:
            done = fn(tensor)
            if id(tensor) not in kept or done.dtype.itemsize >= 4:
                return done
            return tensor.to(device=done.device, dtype=torch.float32)

        return super()._apply(keep, recurse)


class KindModule(Declared):
    """kind: the tables. REFERENCE: slot name -> pure-torch function, what `parts` may replace. ENTRY: the slot of the
    projection that reads x; a part there may do the norm before it as well (forward then gets it as `norm`)."""

    kind: Kind
    #: What adds up a projection inside of a layer whose channels several ranks share.
    summed: Callable[[Tensor], Tensor] = staticmethod(lambda y: y)
    #: Where several ranks share the layer: (x, among) -> the mean of x over so many neighbours (None: over all).
    averaged: Callable[..., Tensor] | None = None
    REFERENCE: Mapping[str, Callable[..., Any]] = {}
    ENTRY = ""

    def __init__(
        self, f: Values, dims: Dims, *, dtype: torch.dtype = torch.float32, device: Any = None,
        parts: Mapping[str, Callable[..., Any]] | None = None,
    ):
        super().__init__()
        self.f, self.dims = f, dims
        self.parts = {**self.REFERENCE, **(parts or {})}
        #: The names of what it gives to layers below, and takes from layers above.
        self.gives = tuple(c.name for c in self.kind.gives(f, dims))
        self.takes = tuple(c.name for c in self.kind.takes(f, dims))
        table = self.kind.weights(f, dims)
        self._narrow = next(w.name for w in table if not w.fp32)
        self.declare(table, dtype=dtype, device=device)

    def view(self, parts: Mapping[str, Callable[..., Any]]) -> KindModule:
        """The same weights with other parts, for one use of a shared layer. The two share the tables that hold the
        weights, so that a weight replaced in one is replaced in the other."""
        other = copy(self)
        other.parts = {**self.REFERENCE, **parts}
        return other

    @property
    def waiting(self) -> tuple[str, ...]:
        """Slots whose functions wait for the device: no CUDA graph holds them, and torch.compile cannot trace them."""
        return tuple(slot for slot, part in self.parts.items() if getattr(part, "waits", False))

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in: the dtype of its weights that are not declared float32."""
        return self.get_parameter(self._narrow).dtype

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: Any = None, room: Room | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """The state before the first token: tensors [B, *shape] of zeros; `dtype`, and `state_dtype` where the table
        asks for float32. Per-token ones are empty, [B, 0, *shape]; with `room`, they are [B, capacity + 1, *shape] and
        the state is a `FixedState`. The last slot is for padding, which nobody reads."""
        table = self.kind.state(self.f, self.dims)
        return empty_state(table, batch, dtype=dtype, device=device, room=room, state_dtype=state_dtype)

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None,
        **taken: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        raise NotImplementedError

    def enter(self, x_BTD: Tensor, projection: Holder, norm: nn.Module | None) -> Tensor:
        """The ENTRY projection of x, and the norm before it where that is left to the part."""
        part = self.parts[self.ENTRY]
        if norm is None:
            return part(x_BTD, projection.weight, projection.bias)
        return part(x_BTD, projection.weight, projection.bias, norm=norm)

    def convolve(self, x_BTC: Tensor, rows: Rows, state: dict[str, Any] | None) -> tuple[Tensor, Tensor | None]:
        """The slot `conv` on packed rows, and the inputs to keep as `conv` (None without a state)."""
        return self.parts["conv"](
            x_BTC, self.conv.weight, self.conv.bias,
            segments_BT=rows.segments_BT, lengths_B=rows.lengths_B, state_BCJ=rows.past(state, "conv"),
        )


def empty_state(
    table: Iterable[State], batch: int, *, dtype: torch.dtype, device: Any = None, room: Room | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """A state of these tensors, as `KindModule.init_state` says."""
    slots = 0 if room is None else room.capacity + 1
    state: dict[str, Any] = {}
    for s in table:
        shape = (batch, slots, *s.shape) if s.per_token else (batch, *s.shape)
        state[s.name] = torch.zeros(shape, dtype=state_dtype if s.fp32 else dtype, device=device)
        if s.first_innermost and room is not None:
            state[s.name] = state[s.name].mT.contiguous().mT
    return state if room is None else FixedState(state, capacity=room.capacity, room=room)


def add_weights(
    module: nn.Module, weights: tuple[Weight, ...], *, dtype: torch.dtype, device: Any, below: str = ""
) -> None:
    """Registers empty parameters (and buffers, where not trained) under their dotted names. below: where the module
    itself stands, what all names begin with."""
    for w in weights:
        owner = module
        *path, leaf = w.name.removeprefix(below).split(".")
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, Holder())
            owner = owner._modules[step]
        data = torch.empty(w.shape, dtype=torch.float32 if w.fp32 else dtype, device=device)
        if w.trained:
            owner.register_parameter(leaf, nn.Parameter(data))
        else:
            owner._parameters.pop(leaf, None)
            owner.register_buffer(leaf, data)


class Holder(nn.Module):
    """A name with weights below it: `in_proj` in `in_proj.weight`. Weights it lacks read as None."""

    def __init__(self):
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
