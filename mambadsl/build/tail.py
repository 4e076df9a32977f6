"""One depth of the multi-token-prediction tail (DeepSeek-V3, arXiv:2412.19437, 2.2), without its layers.

    h_k = final_norm(layers(eh_proj([enorm(e_k), hnorm(h_{k-1})])))        logits_k = head(h_k)

h_0 is what the model's head reads, after the final norm, and e_k the embedding of the k-th token after this one, both
as in Megatron-Core and transformers' `MtpModel` (the paper has the hidden state first, and before the norm).
Letters: B batch, T time, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.kinds.kind import linear
from mambadsl.kinds.module import add_weights
from mambadsl.kinds.norm import Norm
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Variant


class Depth(nn.Module):
    """Children are named as `graph.weights` names them: `enorm`, `hnorm`, `eh_proj`, `final_norm`, and the layers
    that are the depth's own, `0`, `1`, ..."""

    def __init__(self, norm: Variant, d_model: int, *, dtype: torch.dtype, device: Any = None, **rms: Any):
        """rms: what computes RMS norms, as in `Norm`."""
        super().__init__()
        made = dict(dtype=dtype, device=device)
        for name in ("enorm", "hnorm", "final_norm"):
            self.add_module(name, Norm(norm, d_model, **rms, **made))
        add_weights(self, linear("eh_proj", d_model, 2 * d_model), **made)

    def join(self, next_BTD: Tensor, h_BTD: Tensor) -> Tensor:
        """The stream that the depth's layers read, [B, T, D] in the dtype of the weights."""
        weight = self.eh_proj.weight
        both = self.enorm(next_BTD, dtype=weight.dtype), self.hnorm(h_BTD, dtype=weight.dtype)
        return F.linear(torch.cat(both, -1), weight)


def successors(x_BTD: Tensor, tokens: Tokens) -> Tensor:
    """Each token's successor in its document; zeros where it has none."""
    next_BTD = F.pad(x_BTD[:, 1:], (0, 0, 0, 1))
    if tokens.segments_BT is None:
        return next_BTD
    same_BT = F.pad(tokens.segments_BT[:, 1:] == tokens.segments_BT[:, :-1], (0, 1))
    return torch.where(same_BT[..., None], next_BTD, 0)
