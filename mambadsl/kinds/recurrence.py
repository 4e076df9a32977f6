"""Row by row, token by token: how every naive recurrent definition walks a batch. Torch.

Modules share no code with it: it is the loop that they are held to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mambadsl.kinds.tokens import PADDING, Tokens

#: (x_D of one token, its row's state) -> (y_D, the state after it).
Step = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def token_by_token(
    step: Step, shapes: Mapping[str, tuple[int, ...]], x_BTD: Tensor, tokens: Tokens,
    state: Mapping[str, Any] | None, *, d_model: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """shapes: of one row's state, by name. A state starts from zeros with each document, and from `state`
    (tensors [B, *shape] and, where it is not 0, "segment" [B]) for the one that it ended in. Returns y_BTD
    (zeros at padding, the dtype of x) and the state after it, float32."""
    B, T, _ = x_BTD.shape
    zeros = x_BTD.float().new_zeros
    segments_BT = zeros(B, T) if tokens.segments_BT is None else tokens.segments_BT
    outputs, after = [], []
    for b in range(B):
        fresh = {name: zeros(shape) for name, shape in shapes.items()}
        if state is None:
            now, document = fresh, 0
        else:
            now = {name: state[name][b].float() for name in shapes}
            document = int(state["segment"][b]) if "segment" in state else 0
        row = []
        for t in range(T):
            segment = int(segments_BT[b, t])
            if segment == PADDING:
                row.append(zeros(d_model))
                continue
            if segment != document:
                now, document = fresh, segment
            y_D, now = step(x_BTD[b, t].float(), now)
            row.append(y_D)
        outputs.append(torch.stack(row))
        after.append({**now, "segment": zeros((), dtype=torch.int32) + document})
    states = {name: torch.stack([row[name] for row in after]) for name in (*shapes, "segment")}
    return torch.stack(outputs).to(x_BTD.dtype), states
