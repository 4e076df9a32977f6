"""Several residual streams: what the forms `hyper`, `mhc` and `gated` compute, and `narrow` (`kinds/streams.py`).

Letters: B batch, T time, N streams, D d_model, S = N * D the streams side by side, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambadsl.build.earlier import attended
from mambadsl.build.residual import Add
from mambadsl.kinds.module import Declared
from mambadsl.kinds.norm import Norm, rms_norm
from mambadsl.kinds.streams import final_norm, narrow_weights
from mambadsl.kinds.values import Values


class Mixed(Add):
    """Each token has weights: pre_N of what is read of each stream, post_N of what is added to each, and mix_NN of
    what goes from each (row) to each (column); in float32."""

    def weights(self, x_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre, post [B, T, N] and mix [B, T, N, N]."""
        raise NotImplementedError

    def read(self, x_BTS: Tensor, t_BTD: Tensor | None) -> tuple[Tensor, Any]:
        x_BTND = x_BTS.unflatten(-1, (self.form.streams, -1))
        pre_BTN, *kept = self.weights(x_BTND)
        return (pre_BTN[..., None] * x_BTND).sum(-2).to(x_BTS.dtype), kept

    def write(self, x_BTS: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        post_BTN, mix_BTNN = (w.to(x_BTS.dtype) for w in kept)
        old_BTND = mix_BTNN.mT @ x_BTS.unflatten(-1, (self.form.streams, -1))
        return (old_BTND + post_BTN[..., None] * y_BTD[..., None, :].to(x_BTS.dtype)).flatten(-2)


class Hyper(Mixed):
    """Hyper-connections, as arXiv:2512.24880 (equation 5) restates them: for each stream its own weights, tanh of a
    projection of it, normed, beside those that every token has."""

    def weights(self, x_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.form.streams
        h_BTND = rms_norm(x_BTND.float(), None, eps=self.form.norm_eps)
        own = torch.tanh(F.linear(h_BTND, self.proj.weight)).split((1, 1, n), -1)
        shared = self.bias.split((n, n, n * n))
        pre, post, mix = (s * w + b.view(n, -1) for s, w, b in zip(self.scale, own, shared))
        return pre[..., 0], post[..., 0], mix


class Manifold(Mixed):
    """mHC: from all streams together, normed."""

    def weights(self, x_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, eps = self.form.streams, self.form.eps
        h_BTS = rms_norm(x_BTND.flatten(-2).float(), None, eps=self.form.norm_eps)
        sizes = n, n, n * n
        own, shared = F.linear(h_BTS, self.proj.weight).split(sizes, -1), self.bias.split(sizes)
        pre, post, mix = (s * w + b for s, w, b in zip(self.scale, own, shared))
        mix = torch.softmax(mix.unflatten(-1, (n, n)), -1) + eps
        return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), sinkhorn(mix, rounds=self.form.iterations, eps=eps)


def sinkhorn(mix_NN: Tensor, *, rounds: int, eps: float) -> Tensor:
    """Rows are normalised already. Columns, then rows and columns in turn (Sinkhorn-Knopp), [..., N, N]."""
    for k in range(rounds):
        if k:
            mix_NN = mix_NN / (mix_NN.sum(-1, keepdim=True) + eps)
        mix_NN = mix_NN / (mix_NN.sum(-2, keepdim=True) + eps)
    return mix_NN


class Gated(Add):
    """Each channel of each stream has a gate; the streams stay as they are but for what is added."""

    def __init__(
        self, sub: Values, d_model: int, *, streams: int, rms: Callable[..., Tensor] = rms_norm, **made: Any
    ):
        super().__init__(sub, d_model, streams=streams, rms=rms, **made)
        self.norm = Norm(sub.norm, streams * d_model, rms=rms, groups=streams, **made)

    def read(self, x_BTS: Tensor, t_BTD: Tensor | None) -> tuple[Tensor, Any]:
        n = self.form.streams
        h_BTS = self.norm(x_BTS, dtype=self.down_proj.weight.dtype)
        post_BTN = 2 * torch.sigmoid(F.linear(h_BTS, self.inject_proj.weight) / n)
        return gated_mean(h_BTS, self.down_proj.weight, self.up_proj.weight, streams=n), post_BTN

    def write(self, x_BTS: Tensor, h_BTI: Tensor, y_BTD: Tensor, kept: Any) -> Tensor:
        return x_BTS + (kept[..., None] * y_BTD[..., None, :]).flatten(-2).to(x_BTS.dtype)


def gated_mean(h_BTS: Tensor, down_RS: Tensor, up_SR: Tensor, *, streams: int) -> Tensor:
    """The mean of the streams, each channel times its gate, [B, T, D]."""
    gate_BTS = torch.sigmoid(F.linear(F.silu(F.linear(h_BTS, down_RS) / streams), up_SR))
    return (gate_BTS * h_BTS).unflatten(-1, (streams, -1)).mean(-2)


def widen(x_BTD: Tensor, streams: int) -> Tensor:
    """A copy for each stream, [B, T, S]; x itself for one."""
    return x_BTD if streams == 1 else x_BTD.repeat(1, 1, streams)


class Narrow(Declared):
    """One stream of several, as the model's `narrow` says; of one, itself. Children are named as its weights are,
    below `narrow`."""

    def __init__(
        self, model: Values, streams: int, *, dtype: torch.dtype, device: Any = None,
        rms: Callable[..., Tensor] = rms_norm,
    ):
        super().__init__()
        self.form, self.streams = model.narrow, streams
        made = dict(dtype=dtype, device=device)
        self.declare(narrow_weights(model, streams), below="narrow.", **made)
        if streams > 1 and final_norm(model, streams) != model.norm:
            self.norm = Norm(model.norm, streams * model.d_model, rms=rms, groups=streams, **made)

    def forward(self, x_BTS: Tensor) -> Tensor:
        return x_BTS if self.streams == 1 else _NARROWED[self.form.name](self, x_BTS)

    def _weighted(self, x_BTS: Tensor) -> Tensor:
        h_BTS = rms_norm(x_BTS.float(), None, eps=self.form.norm_eps)
        pre_BTN = torch.sigmoid(F.linear(h_BTS, self.proj.weight) * self.scale + self.bias) + self.form.eps
        return (pre_BTN[..., None] * x_BTS.unflatten(-1, (self.streams, -1))).sum(-2).to(x_BTS.dtype)

    def _gated(self, x_BTS: Tensor) -> Tensor:
        h_BTS = self.norm(x_BTS, dtype=self.down_proj.weight.dtype)
        return gated_mean(h_BTS, self.down_proj.weight, self.up_proj.weight, streams=self.streams)


_NARROWED: dict[str, Callable[[Narrow, Tensor], Tensor]] = {
    "mean": lambda self, x_BTS: x_BTS.unflatten(-1, (self.streams, -1)).mean(-2),
    "sum": lambda self, x_BTS: x_BTS.unflatten(-1, (self.streams, -1)).sum(-2),
    "weighted": Narrow._weighted,
    "gated": Narrow._gated,
    "attend": lambda self, x_BTS: attended(x_BTS.chunk(self.streams, -1), self),
}
