"""A corpus cut into rows, and rows as batches of tensors.

A row is `length` consecutive tokens, whatever documents they are of. The corpus' last row is padded where it is
incomplete, so every token is in exactly one row. The last share of the rows may be held out. Letters: B batch, T time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mambadsl.build.loss import IGNORE
from mambadsl.data.corpus import Corpus
from mambadsl.data.order import permuted

#: The document number of places without a token.
PADDING = -1


@dataclass(frozen=True)
class Batch:
    """tokens_BT: int64, 0 where padded. targets_BT: int64, each token's successor in its document, that after the row
    for the row's last token; IGNORE at a document's end and at padding. segments_BT: int32, which of the row's
    documents (from 0); -1 where padded."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor


class Rows:
    """count: training rows of one epoch. held_out_count: rows at the corpus' end that are not trained on.

    ValueError for a length that the corpus does not have, and for a share that leaves nothing to train on.
    """

    def __init__(self, corpus: Corpus, *, length: int, seed: int = 0, held_out: float = 0.0):
        tokens = len(corpus.tokens)
        if length < 1:
            raise ValueError(f"a row has at least 1 token, not {length}")
        if length > tokens:
            raise ValueError(f"rows of {length} tokens are longer than the corpus, which has {tokens}")
        if not 0 <= held_out < 1:
            raise ValueError(f"the share that is held out is from 0 to below 1, not {held_out}")
        rows = -(-tokens // length)
        self.corpus, self.length, self.seed = corpus, length, seed
        self.held_out_count = max(1, round(rows * held_out)) if held_out else 0
        self.count = rows - self.held_out_count
        if self.count < 1:
            raise ValueError(
                f"held_out = {held_out} leaves no row to train on: the corpus has {tokens} tokens, {rows} "
                f"{'row' if rows == 1 else 'rows'} of {length}"
            )

    def training(self, first: int, count: int) -> Batch:
        """Samples first .. first + count of the endless order: epoch after epoch, each permuted by (seed, epoch). A
        sample is a function of its number alone, whoever asks and whatever was asked before."""
        if first < 0 or count < 0:
            raise ValueError(f"samples are counted from 0; first = {first}, count = {count}")
        return self._batch(permuted(np.arange(first, first + count), count=self.count, seed=self.seed))

    def held_out(self, first: int, count: int) -> Batch:
        """Held-out rows first .. first + count, in the corpus' order."""
        if not 0 <= first <= first + count <= self.held_out_count:
            raise ValueError(f"{self.held_out_count} rows are held out; first = {first}, count = {count}")
        return self._batch(self.count + np.arange(first, first + count))

    def _batch(self, rows_B: np.ndarray) -> Batch:
        # One token more than the row: the last one's target.
        ids = np.zeros((len(rows_B), self.length + 1), np.int64)
        segments = np.full(ids.shape, PADDING, np.int32)
        ends = self.corpus.ends
        for b, row in enumerate(rows_B.tolist()):
            start = row * self.length
            found = self.corpus.tokens[start : start + self.length + 1]
            ids[b, : len(found)] = found
            begins = np.zeros(len(found), np.int32)
            low, high = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, start + len(found))
            begins[ends[low:high] - start] = 1
            np.cumsum(begins, out=segments[b, : len(found)])
        goes_on = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != PADDING)
        targets = np.where(goes_on, ids[:, 1:], IGNORE)
        arrays = ids[:, :-1], targets, segments[:, :-1]
        return Batch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
