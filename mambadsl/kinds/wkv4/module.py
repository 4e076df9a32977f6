"""RWKV-4's time mixing in torch: the module, and the pure-torch definition of its scan.

Peng and others, arXiv:2305.13048; results match Hugging Face's RwkvSelfAttention. Letters: B batch, T time, D d_model,
I d_inner, c chunks, Q tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.chunks import LONGEST_CHUNK, in_chunks
from mambadsl.kinds.module import KindModule
from mambadsl.kinds.rows import Rows, starts
from mambadsl.kinds.shift import mix, shifted
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.wkv4.kind import KIND

#: The logarithm of nothing: exp of it is 0 beside any other, and differences of two are finite.
NOTHING = -1e30
#: exp(-exp(40)) is 0 however many tokens long, and still far from NOTHING.
HIGHEST_DECAY = 40.0

#: values, weight, log_scale: a weighted sum of values, the sum of weights, and the logarithm that both are scaled by.
Sums = tuple[Tensor, Tensor, Tensor]


def weighted_means(
    k_BTI: Tensor, v_BTI: Tensor, rate_I: Tensor, first_I: Tensor, real_BT1: Tensor, *, chunk: int,
    segments_BT: Tensor | None = None, past: Sums | None = None,
) -> tuple[Tensor, Sums]:
    """The scan: for each channel, with sums from `past` (nothing where None, and at every later document of a row),

        y_t = (a_{t-1} + exp(first + k_t) v_t) / (b_{t-1} + exp(first + k_t))
        a_t = exp(-rate) a_{t-1} + exp(k_t) v_t         b_t = exp(-rate) b_{t-1} + exp(k_t)

    real: 1, and 0 at padding, where the sums stay as they are. Returns y_BTI in the dtype of v, and the sums after the
    last token, float32. By doubling spans inside chunks, chunk by chunk.
    """
    (B, T, I), dtype = v_BTI.shape, v_BTI.dtype
    Q = min(chunk, T, LONGEST_CHUNK)
    k_BTI, v_BTI = torch.where(real_BT1 == 1, k_BTI.float(), NOTHING), v_BTI.float()
    # Zeros after the last token would be keys.
    k_BcQI = in_chunks(F.pad(k_BTI, (0, 0, 0, -T % Q), value=NOTHING), Q)
    one_BcQI = in_chunks(real_BT1.float().expand(B, T, I), Q)
    now: Sums = in_chunks(v_BTI * real_BT1, Q), one_BcQI, k_BcQI
    # How long ago each token's chunk began, in real tokens; and which tokens before it are of its document.
    age_BcQ1 = in_chunks(real_BT1.float(), Q).cumsum(2)
    begins_BT = torch.zeros_like(real_BT1[..., 0], dtype=torch.bool) if segments_BT is None else starts(segments_BT)
    document_BcQ1 = in_chunks(begins_BT, Q).cumsum(2)[..., None]
    span = 1
    while span < Q:
        earlier = tuple(t[:, :, :-span] for t in now)
        same = document_BcQ1[:, :, span:] == document_BcQ1[:, :, :-span]
        lag = age_BcQ1[:, :, span:] - age_BcQ1[:, :, :-span]
        later = _add(tuple(t[:, :, span:] for t in now), earlier, torch.where(same, lag * rate_I, -NOTHING))
        now = tuple(torch.cat([t[:, :, :span], new], 2) for t, new in zip(now, later))
        span *= 2

    # From chunk to chunk, then each token with the sums before its chunk.
    whole_BcQI = torch.where(document_BcQ1 == 0, age_BcQ1 * rate_I, -NOTHING)
    sums = no_sums(B, I, v_BTI.device) if past is None else valid_sums(past)
    before = []
    for c in range(k_BcQI.shape[1]):
        before.append(sums)
        sums = _add(tuple(t[:, c, -1] for t in now), sums, whole_BcQI[:, c, -1])
    starts_with = tuple(torch.stack(t, 1)[:, :, None] for t in zip(*before))
    now = _add(now, starts_with, whole_BcQI)

    # What a token sees: the sums after the token before it, and itself.
    first = tuple(t[:, 0] for t in starts_with)
    seen = tuple(torch.cat([f[:, :1], t.flatten(1, 2)[:, : T - 1]], 1) for f, t in zip(first, now))
    ends_BTI = torch.where(begins_BT[..., None], -NOTHING, torch.zeros_like(k_BTI))
    values, weight, _ = _add((v_BTI, torch.ones_like(v_BTI), k_BTI + first_I), seen, ends_BTI)
    if past is not None:
        some_B1 = real_BT1.any(1)
        sums = tuple(torch.where(some_B1, t, old.float()) for t, old in zip(sums, past))
    return (values / weight).to(dtype), sums


def _add(newer: Sums, older: Sums, decay: Tensor) -> Sums:
    """Both sums, the older ones exp(-decay) of what they were. The scale cancels out wherever sums are used, so no
    gradient goes through it."""
    (a, b, scale), (old_a, old_b, old_scale) = newer, older
    with torch.no_grad():
        new_scale = torch.maximum(scale, old_scale - decay)
    keep, add = (old_scale - decay - new_scale).exp(), (scale - new_scale).exp()
    return add * a + keep * old_a, add * b + keep * old_b, new_scale


def no_sums(B: int, I: int, device: torch.device) -> Sums:
    zeros = torch.zeros(B, I, device=device)
    return zeros, zeros, torch.full_like(zeros, NOTHING)


def valid_sums(past: Sums) -> Sums:
    """A state that no token has gone into is zeros."""
    values, weight, log_scale = (t.float() for t in past)
    there = weight > 0
    return torch.where(there, values, 0), torch.where(there, weight, 0), torch.where(there, log_scale, NOTHING)


class Module(KindModule):
    """Slots: k_proj, v_proj, r_proj, out_proj (x, weight, bias) -> y as F.linear; scan as in this file."""

    kind = KIND
    REFERENCE = {
        "k_proj": F.linear, "v_proj": F.linear, "r_proj": F.linear, "scan": weighted_means, "out_proj": F.linear,
    }

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, state: dict[str, Any] | None = None, *, norm: nn.Module | None = None
    ) -> Tensor:
        rows, parts = Rows.of(tokens, state), self.parts
        x_BTD = rows.pack(x_BTD)
        before_BTD, last_BD = shifted(x_BTD, rows, rows.past(state, "shift"))
        k_BTI, v_BTI, r_BTI = (
            parts[name](mix(x_BTD, before_BTD, share_D), projection.weight, None)
            for name, share_D, projection in (
                ("k_proj", self.mix_k, self.k_proj), ("v_proj", self.mix_v, self.v_proj),
                ("r_proj", self.mix_r, self.r_proj),
            )
        )
        names = "values", "weight", "log_scale"
        y_BTI, sums = parts["scan"](
            k_BTI, v_BTI, self.time_decay.float().clamp_max(HIGHEST_DECAY).exp(), self.time_first.float(),
            rows.without_padding(torch.ones_like(x_BTD[..., :1])), chunk=self.f.chunk, segments_BT=rows.segments_BT,
            past=None if state is None else tuple(rows.past(state, name) for name in names),
        )
        rows.keep(state, shift=last_BD, **dict(zip(names, sums)))
        y_BTI = torch.sigmoid(r_BTI) * y_BTI
        return rows.unpack(parts["out_proj"](y_BTI, self.out_proj.weight, None))
