"""Compressed convolutional attention in torch.

Queries and keys are what two convolutions make of them, plus the mean of a query head and its key head; both have the
length sqrt(P), keys times their head's temperature. Of a token's values, one half is projected from the token before.
Results match Hugging Face's ZayaAttention. Letters: B batch, T time, D d_model, H query heads, K key/value heads,
G = H + K, P head_dim, C = G * P, N taps, J = N - 1 earlier inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.attend import attend
from mambadsl.kinds.attention.kind import kv_dim, q_dim, rotary_dim
from mambadsl.kinds.attention.rope import rope_tables, rotate
from mambadsl.kinds.cca.kind import KIND, in_segments
from mambadsl.kinds.conv import last_inputs, plain_conv, reach
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.past import extend, with_places
from mambadsl.kinds.rows import Rows
from mambadsl.kinds.shift import shifted
from mambadsl.kinds.tokens import Tokens

#: The least length that a query or key is divided by: float32's epsilon.
LEAST = 2.0**-23


def head_conv(
    x_BTC: Tensor, weight_GPPN: Tensor, bias_C: Tensor | None = None, *, segments_BT: Tensor | None = None,
    lengths_B: Tensor | None = None, state_BCJ: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = bias + sum_n weight[..., N - 1 - n] x_{t-n} in each head, over inputs of the same document only; and the
    inputs before the next token [B, C, J], None without a state. The keywords are as in `kinds.conv.causal_conv`."""
    G, P, _, N = weight_GPPN.shape
    B, J = x_BTC.shape[0], N - 1
    before_BJC = x_BTC.new_zeros(B, J, G * P) if state_BCJ is None else state_BCJ.transpose(1, 2).to(x_BTC.dtype)
    x_BSC = torch.cat((before_BJC, x_BTC), 1)
    taps_BTCN = x_BSC.unfold(1, N, 1)
    if segments_BT is not None:
        lags_N = torch.arange(J, -1, -1, device=x_BTC.device)
        taps_BTCN = taps_BTCN * (reach(segments_BT, J)[..., None, None] >= lags_N)
    y_BTGP = torch.einsum("btgqn,gpqn->btgp", taps_BTCN.unflatten(2, (G, P)), weight_GPPN)
    y_BTC = y_BTGP.flatten(2) if bias_C is None else y_BTGP.flatten(2) + bias_C
    return y_BTC, None if state_BCJ is None else last_inputs(x_BSC, J, segments_BT, lengths_B)


class Module(KindModule):
    """REFERENCE: qkv_proj and o_proj (x, weight, bias or None) -> [B, T, out]; conv as `plain_conv`, head_conv as in
    this file, both without biases; core as `attend`.

    Its state has k and v after rope [B, S, K, P], what those keys are, as in `kinds/past.py`, and what comes before the
    next token: `conv`, `head_conv` and `v_next`.
    """

    kind = KIND
    ENTRY = "qkv_proj"
    REFERENCE = {"qkv_proj": F.linear, "conv": plain_conv, "head_conv": head_conv, "core": attend, "o_proj": F.linear}

    def init_state(self, batch: int, **made: Any) -> dict[str, Any]:
        return with_places(super().init_state(batch, **made))

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        f, rows = self.f, Rows.of(tokens, state)
        projected = self.enter(rows.pack(x_BTD), self.qkv_proj, norm)
        q, k, v, v_next = projected.split([size for _, size in in_segments(f)], -1)
        qk_BTC, after = self._convolved(torch.cat((q, k), -1), rows, state)
        # Before the first token stands the projection of nothing: the bias.
        rest = self.qkv_proj.bias[-v_next.shape[-1] :] if f.bias else 0
        v_before, last = shifted(v_next - rest, rows, rows.past(state, "v_next"))
        rows.keep(state, **after, v_next=last)
        mixed = (*qk_BTC.split([q_dim(f), kv_dim(f)], -1), q, k, torch.cat((v, v_before + rest), -1))
        heads = (rows.unpack(t).unflatten(-1, (-1, f.head_dim)) for t in mixed)
        q_BTHP, k_BTKP, v_BTKP = self._normed(*heads)
        if rotary_dim(f):
            cos_sin = rope_tables(f.rope, rotary_dim(f), tokens)
            q_BTHP, k_BTKP = rotate(q_BTHP, *cos_sin), rotate(k_BTKP, *cos_sin)
        queries = keys = tokens
        if state is not None:
            seen, queries, keys = extend(state, dict(k=k_BTKP, v=v_BTKP), tokens, window=f.window)
            k_BTKP, v_BTKP = seen["k"], seen["v"]
        how = dict(scale=f.head_dim**-0.5, window=f.window, softcap=None)
        y_BTHP = self.parts["core"](q_BTHP, k_BTKP, v_BTKP, queries, keys, **how)
        return self.parts["o_proj"](y_BTHP.flatten(2), self.o_proj.weight, self.o_proj.bias)

    def _convolved(
        self, qk_BTC: Tensor, rows: Rows, state: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Both convolutions, and the inputs to keep. Before a document stand inputs of zero, of which the first
        convolution makes its bias: so that bias goes through all taps of the second, and is added behind it."""
        after = {}
        for name, conv in ("conv", self.conv), ("head_conv", self.head_conv):
            qk_BTC, after[name] = self.parts[name](
                qk_BTC, conv.weight, None, segments_BT=rows.segments_BT, lengths_B=rows.lengths_B,
                state_BCJ=rows.past(state, name),
            )
        bias_GP = self.conv.bias.unflatten(0, (-1, self.f.head_dim))
        through_GP = torch.einsum("gpqn,gq->gp", self.head_conv.weight, bias_GP)
        return qk_BTC + (self.head_conv.bias + through_GP.flatten()), after

    def _normed(
        self, q_BTHP: Tensor, k_BTKP: Tensor, q0_BTHP: Tensor, k0_BTKP: Tensor, v_BTKP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys out of the convolutions plus the means of what went in (q0, k0), normed."""
        mean_BTKNP = (q0_BTHP.unflatten(2, (self.f.kv_heads, -1)) + k0_BTKP[:, :, :, None]) / 2
        q, k = q_BTHP + mean_BTKNP.flatten(2, 3), k_BTKP + mean_BTKNP.mean(3)
        q, k = (F.normalize(t.float(), dim=-1, eps=LEAST) * self.f.head_dim**0.5 for t in (q, k))
        return q.to(v_BTKP.dtype), (k * self.temperature[:, None]).to(v_BTKP.dtype), v_BTKP
