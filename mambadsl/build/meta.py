"""Meta tokens (Hymba, arXiv:2411.13676): learned vectors that stand before the tokens of each document.

The layers see rows that are longer: a document's meta tokens have its positions 0 to M - 1, its own tokens come after
them. They are put in behind the embedding and taken out before the head, so no caller sees them. With a decoding state
they stand before the first chunk, and the state keeps what they leave behind.

Letters: B batch, T tokens of a row, M meta tokens, U = T and the meta tokens of all its documents, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambadsl.build.state import before
from mambadsl.kinds.tokens import PADDING, Tokens


@dataclass(frozen=True)
class WithMeta:
    """Rows as layers see them. tokens: what they are. ahead: so many meta tokens stand before each row. Of packed rows
    instead: from_BU, what is at each place: a token of the row, from 0, or a meta token, from T; place_BT: where each
    token is."""

    tokens: Tokens
    ahead: int = 0
    from_BU: Tensor | None = None
    place_BT: Tensor | None = None

    def insert(self, x_BTD: Tensor, meta_MD: Tensor | None) -> Tensor:
        if self.from_BU is None and not self.ahead:
            return x_BTD
        meta_BMD = meta_MD.to(x_BTD.dtype).expand(x_BTD.shape[0], -1, -1)
        if self.from_BU is None:
            return torch.cat((meta_BMD, x_BTD), 1)
        return _taken(torch.cat((x_BTD, meta_BMD), 1), self.from_BU)

    def strip(self, x_BUD: Tensor) -> Tensor:
        return x_BUD[:, self.ahead :] if self.place_BT is None else _taken(x_BUD, self.place_BT)


def _taken(x_BTD: Tensor, index_BU: Tensor) -> Tensor:
    return x_BTD.gather(1, index_BU[..., None].expand(-1, -1, x_BTD.shape[2]))


def ahead(tokens: Tokens, count: int) -> WithMeta:
    """Rows of one document each, `count` meta tokens before them (and before what padding they have)."""
    positions_BM = torch.arange(count, device=tokens.positions_BT.device).expand(tokens.batch, count)
    positions_BU = torch.cat((positions_BM, tokens.positions_BT + count), 1)
    segments_BU = tokens.segments_BT
    if segments_BU is not None:
        segments_BU = torch.cat((segments_BU.new_zeros((tokens.batch, count)), segments_BU), 1)
    return WithMeta(Tokens(positions_BU, segments_BU), count)


def packed(tokens: Tokens, count: int) -> WithMeta:
    """Rows of several documents, `count` meta tokens before the first token of each; rows with fewer documents than
    others end in padding. How long they are depends on the data: the host waits for it (ValueError in a CUDA graph)."""
    segments_BT, T = tokens.segments_BT, tokens.length
    if segments_BT.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("rows of packed documents with meta tokens have no fixed length: no CUDA graph can hold them")
    real_BT = segments_BT != PADDING
    first_BT = real_BT & (segments_BT != before(segments_BT, torch.full_like(segments_BT[:, 0], PADDING)))
    documents_BT = first_BT.long().cumsum(1)
    place_BT = torch.arange(T, device=segments_BT.device) + count * documents_BT
    U = T + count * int(documents_BT[:, -1].max())
    at_BU = torch.arange(U, device=segments_BT.device).expand(tokens.batch, U).contiguous()
    # Of each place the token that is there, or that the meta tokens there are before.
    next_BU = torch.searchsorted(place_BT, at_BU)
    ended_BU, next_BU = next_BU == T, next_BU.clamp_max(T - 1)
    meta_BU = count - (place_BT.gather(1, next_BU) - at_BU)
    own_BU = meta_BU == count
    meta_BU = torch.where(ended_BU, 0, meta_BU)
    positions_BU = torch.where(own_BU, tokens.positions_BT.gather(1, next_BU) + count, meta_BU)
    segments_BU = torch.where(ended_BU, PADDING, segments_BT.gather(1, next_BU))
    from_BU = torch.where(own_BU, next_BU, T + meta_BU)
    return WithMeta(Tokens(positions_BU, segments_BU), 0, from_BU, place_BT)
