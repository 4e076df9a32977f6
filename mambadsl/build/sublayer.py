"""One residual sublayer: a node of the graph -> a torch module around one kind's module, or a sum of several.

A shared layer is one such module with the weights, at its owner's path, and one for each use, at the use's: with its
own parts, adapters and place in the stream, and the owner's weights.

The residual form's class (`residual.py`) reads the stream, the norm and the branches follow, and it makes the stream
of what they give: with f(h) the sum over the branches of out_multiplier * dropout(branch(in_multiplier * h)), the
default form gives x + f(norm(x)).

`input=with_embedding`: norm and branches read x and the first embedding x0 side by side, 2 * d_model wide.
The stream keeps its dtype (float32 with `residual_dtype = fp32`); branches work in that of their weights.
Letters: B batch, T time, D d_model, I width that the branches read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambadsl.build.adapter import adapted
from mambadsl.build.earlier import Attend
from mambadsl.build.fill import NOTHING, Filled
from mambadsl.build.residual import Add, Affine, Aside, Normed, scaled
from mambadsl.build.streams import Gated, Hyper, Manifold
from mambadsl.graph.graph import Node
from mambadsl.kinds.module import KindModule, add_weights
from mambadsl.kinds.norm import Norm, rms_norm
from mambadsl.kinds.registry import get
from mambadsl.kinds.residual import form_of
from mambadsl.kinds.state import FixedState
from mambadsl.kinds.sublayer import adapter_weights
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values

#: Residual form -> its class.
WAYS: dict[str, type[Add]] = {
    "pre": Add, "post": Add, "sandwich": Add, "normed": Normed, "affine": Affine,
    "aside": Aside, "hyper": Hyper, "mhc": Manifold, "gated": Gated, "attend": Attend,
}

#: The decoding state of each branch.
States = Sequence[dict[str, Any]]
NONE_TAKEN: Mapping[str, Any] = {}


class Sublayer(nn.Module):
    """Children are named as `graph.weights` names them: `norm`, `post_norm`, `residual`, and `mixer`, or `0`, `1`,
    ... for the branches of a sum."""

    def __init__(
        self, node: Node, *, d_model: int, dtype: torch.dtype, device: Any = None, filled: Sequence[Filled] = (),
        rms: Callable[..., Tensor] = rms_norm, streams: int = 1, of: Sublayer | None = None,
    ):
        """filled: the parts of each branch. rms: what computes RMS norms. streams: the most that a use of its weights
        reads. of: the sublayer that has the weights, for a use of a shared one."""
        super().__init__()
        self.sub, self.branches = node.layer.sub, node.layer.branches
        self.form, dims = form_of(self.sub.residual), node.dims(d_model)
        made = dict(dtype=dtype, device=device)
        self._views: tuple[KindModule, ...] = ()
        self.mixers = ("mixer",) if len(self.branches) == 1 else tuple(map(str, range(len(self.branches))))
        filled = filled or [NOTHING] * len(self.branches)
        if of is None:
            for norm, width in (self.form.before, dims.d_in), (self.form.after, d_model):
                if norm:
                    self.add_module(norm, Norm(self.sub.norm, width, rms=rms, **made))
            self.residual = WAYS[self.sub.residual.name](self.sub, d_model, streams=streams, rms=rms, **made)
            for name, branch, parts in zip(self.mixers, self.branches, filled, strict=True):
                module = get(branch.kind).module()
                self.add_module(name, module(branch.fields, dims, parts=parts.functions, **made))
        else:
            # Held, not registered: the weights have one name each.
            for name in set(of._modules) - set(self.mixers):
                self.__dict__[name] = of._modules[name]
            self._views = tuple(m.view(p.functions) for m, p in zip(of.mixer_modules(), filled, strict=True))
        if of is not None or not node.shared:
            for name, branch, mixer in zip(self.mixers, self.branches, self.mixer_modules()):
                self._adapt(name, branch.branch, mixer, **made)
        #: It gives something to layers below.
        self.gives = any(mixer.gives for mixer in self.mixer_modules())
        #: The norm is done by the part that fills the only branch's entry projection.
        self.leaves_norm = len(filled) == 1 and filled[0].takes_norm
        #: A part does the whole sublayer for one token.
        self.has_step = len(filled) == 1 and "step" in filled[0].functions

    def _adapt(self, name: str, branch: Values, mixer: KindModule, **made: Any) -> None:
        """Makes the factors of a branch's adapter, below the branch's name, and lets its projections use them."""
        factors = adapter_weights(branch, mixer.kind.weights(mixer.f, mixer.dims))
        if not factors:
            return
        if name not in self._modules:
            self.add_module(name, nn.Module())
        add_weights(self._modules[name], factors, **made)
        mixer.parts = adapted(mixer.parts, mixer.kind, factors, self._modules[name])

    def mixer_modules(self) -> tuple[KindModule, ...]:
        return self._views or tuple(self._modules[name] for name in self.mixers)

    def forward(
        self, x_BTD: Tensor, x0_BTD: Tensor | None, tokens: Tokens, states: States | None = None, *,
        t_BTD: Tensor | None = None, taken: Mapping[str, Any] = NONE_TAKEN,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The stream after this sublayer, as it is before it: [B, T, D], several side by side, or those of `attend`, a
        tuple; of one that is aside, its t. Where it gives something to layers below, (that, what it gives by name).
        x0_BTD: needed where the layer reads the first embedding. t_BTD: of the layer before, where that is aside.
        taken: what layers above gave, by name. states: one decoding state per branch, read and written. One token with
        states of fixed size goes through the fused step, if there is one; it updates `x_BTD` in place."""
        if self._steps(tokens, states):
            step, position_B = self.mixer_modules()[0].parts["step"], tokens.positions_BT[:, 0].contiguous()
            return step(self, x_BTD[:, 0], position_B, states[0])[:, None]
        if self.sub.recompute and self.training and states is None and torch.is_grad_enabled():
            # Reading the generator's state is not allowed while a CUDA graph is captured.
            drops = any(branch.branch.dropout for branch in self.branches)
            how = dict(use_reentrant=False, preserve_rng_state=drops)
            return checkpoint(self._add, x_BTD, x0_BTD, tokens, None, t_BTD, taken, **how)
        return self._add(x_BTD, x0_BTD, tokens, states, t_BTD, taken)

    def _steps(self, tokens: Tokens, states: States | None) -> bool:
        return (
            states is not None and self.has_step and isinstance(states[0], FixedState) and tokens.length == 1
            and tokens.segments_BT is None and not torch.is_grad_enabled()
        )

    def _add(
        self, x_BTD: Tensor, x0_BTD: Tensor | None, tokens: Tokens, states: States | None = None,
        t_BTD: Tensor | None = None, taken: Mapping[str, Any] = NONE_TAKEN,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        h_BTI, kept = self.residual.read(x_BTD, t_BTD)
        if self.sub.input == "with_embedding":
            h_BTI = torch.cat((h_BTI, x0_BTD), -1)
        if self.form.before and not self.leaves_norm:
            # Only a stream that goes on with the normed values needs them in its own dtype.
            h_BTI = self.norm(h_BTI, dtype=None if self.form.keeps_normed else self._narrow)
        y_BTD, given = self._sum(h_BTI, tokens, states, taken)
        if self.form.after:
            y_BTD = getattr(self, self.form.after)(y_BTD)
        y_BTD = self.residual.write(x_BTD, h_BTI, y_BTD, kept)
        return (y_BTD, given) if self.gives else y_BTD

    @property
    def _narrow(self) -> torch.dtype:
        """What the branches compute in."""
        return self.mixer_modules()[0].dtype

    def _sum(
        self, h_BTI: Tensor, tokens: Tokens, states: States | None, taken: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        total_BTD, given = None, {}
        for i, (mixer, branch) in enumerate(zip(self.mixer_modules(), self.branches)):
            f = branch.branch
            # Left to the part, the norm reads the stream in the stream's own dtype.
            x_BTI = h_BTI if self.leaves_norm else scaled(h_BTI.to(mixer.dtype), f.in_multiplier)
            more = {name: taken.get(name) for name in mixer.takes}
            if self.leaves_norm:
                more["norm"] = self.norm
            y_BTD = mixer(x_BTI, tokens, states[i] if states is not None else None, **more)
            if mixer.gives:
                y_BTD, own = y_BTD
                given.update(own)
            y_BTD = scaled(F.dropout(y_BTD, f.dropout, self.training), f.out_multiplier)
            total_BTD = y_BTD if total_BTD is None else total_BTD + y_BTD
        return total_BTD, given
