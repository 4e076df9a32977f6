"""The multi-token-prediction tail (DeepSeek-V3, arXiv:2412.19437, 2.2). Depth k computes

    h_k = final_norm(layers(eh_proj([enorm(e_k), hnorm(h_{k-1})])))        logits_k = head(h_k)

h_0 is what the model's head reads, after the final norm, and e_k the embedding of the k-th token after this one, both
as in Megatron-Core and transformers' `MtpModel` (the paper has the hidden state first, and before the norm). It is e_k,
too, that layers with `input=with_embedding` read.
Letters: B batch, T time, D d_model, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambadsl.build.carried import closed
from mambadsl.build.failure import located
from mambadsl.build.meta import WithMeta
from mambadsl.build.state import DecodingState, describe
from mambadsl.build.streams import Narrow, widen
from mambadsl.graph.graph import Role
from mambadsl.kinds.kind import linear
from mambadsl.kinds.module import add_weights
from mambadsl.kinds.norm import Norm
from mambadsl.kinds.streams import final_norm
from mambadsl.kinds.tokens import Tokens
from mambadsl.kinds.values import Values


class Ahead:
    """What a model with a tail does beside `forward`; without one, there are no depths."""

    @property
    def depths(self) -> int:
        """How many tokens further than the next one the `mtp` tail predicts; 0 without one."""
        return self.graph.mtp.settings.depths if self.graph.mtp else 0

    @property
    def loss_weight(self) -> float:
        """Of the tail's losses beside the head's."""
        return self.graph.mtp.settings.loss_weight if self.graph.mtp else 0

    @property
    def trained_depths(self) -> int:
        """The depths that the loss counts."""
        return self.depths if self.loss_weight else 0

    def drafts(
        self, *inputs: Tensor, segments: Tensor | None = None, valid: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Logits of the next token, as `forward` gives them, and from each depth of `mtp` those of the token one
        further on: 1 + depths tensors [B, T, V], float32. Of a whole model, or of a pipeline's last stage.

        Depth k reads the k tokens after each token: logits where they are not there, or of another document, mean
        nothing. Inputs and keywords are as in `forward`.
        """
        if self.stage.gives != ("logits",):
            raise ValueError("drafts come from a whole model, or from a pipeline's last stage")
        self._check(inputs)
        return tuple(map(self.logits, self._ahead(inputs, segments=segments, valid=valid, positions=positions)))

    def hidden(self, tokens_BT: Tensor, *, state: DecodingState | None = None) -> Tensor:
        """What the head of a whole model reads, the stream after the final norm, [B, T, D]; `logits` makes logits of
        it. state: a growing one, from `init_state`."""
        self._check((tokens_BT,))
        if state is not None and state.room is not None:
            raise ValueError("hidden states come with a growing state: `init_state` without `capacity`")
        return self._through((tokens_BT,), segments=None, valid=None, positions=None, state=state)[0]["h"]

    def ahead(
        self, depth: int, tokens_BT: Tensor, h_BTD: Tensor, *, state: DecodingState | None = None
    ) -> Tensor:
        """One depth of `mtp` (from 0) alone, [B, T, D] as from `hidden`.

        h_BTD: what the depth before it gave, or `hidden`; tokens_BT: the id 1 + depth tokens after each. state: from
        `init_state(depth=depth)`.
        """
        tokens = describe(tuple(tokens_BT.shape), device=tokens_BT.device, state=state)
        stream = {"x0": self._embedded(tokens_BT, None), "h": h_BTD}
        h_BTD = self._depth(depth, stream, tokens, state)
        if state is not None:
            state.advance(tokens)
        return h_BTD

    def _ahead(self, inputs: tuple[Tensor, ...], **what: Any) -> Iterator[Tensor]:
        """What the head reads for the next token, and then for each depth of `mtp`, [B, T, D] each."""
        stream, tokens = self._through(inputs, **what)
        yield stream["h"]
        for depth in range(self.depths):
            stream["x0"] = successors(stream["x0"], tokens)
            yield self._depth(depth, stream, tokens)

    def _depth(
        self, depth: int, stream: dict[str, Tensor], tokens: Tokens, state: DecodingState | None = None
    ) -> Tensor:
        """One depth of `mtp`: from "h" and its own tokens' embeddings "x0" to the next "h"."""
        run = {Role.MTP_IN: self._join, Role.LAYER: self._layer, Role.MTP_OUT: self._end}
        for node in self.stage.tail:
            if node.depth == depth:
                with located(node):
                    run[node.role](node, stream, WithMeta(tokens), state, None)
        return stream["h"]

    def _join(self, node, stream, rows, state, last) -> None:
        x_BTD = self.get_submodule(node.depth_owner).join(stream["x0"], stream["h"])
        x_BTD = x_BTD.to(stream["x0"].dtype)
        stream["x"] = self._laid(widen(x_BTD, self.streams[node.path].given))

    def _end(self, node, stream, rows, state, last) -> None:
        depth = self.get_submodule(node.depth_owner)
        stream["h"] = depth.final_norm(depth.narrow(closed(stream["x"])), dtype=self._head_weight().dtype)


class Depth(nn.Module):
    """Children are named as `graph.weights` names them: `enorm`, `hnorm`, `eh_proj`, `narrow`, `final_norm`, and the
    layers that are the depth's own, `0`, `1`, ..."""

    def __init__(self, model: Values, streams: int, *, dtype: torch.dtype, device: Any = None, **rms: Any):
        """streams: of the last layer. rms: what computes RMS norms, as in `Norm`."""
        super().__init__()
        made, d_model = dict(dtype=dtype, device=device), model.d_model
        norms = {"enorm": model.norm, "hnorm": model.norm, "final_norm": final_norm(model, streams)}
        for name, norm in norms.items():
            self.add_module(name, Norm(norm, d_model, **rms, **made))
        self.narrow = Narrow(model, streams, **rms, **made)
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
