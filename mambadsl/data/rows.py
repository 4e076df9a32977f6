"""A corpus cut into rows, and rows as batches of tensors.

A row is `length` consecutive tokens, whatever documents they are of. The corpus' last row is padded where it is
incomplete, so every token is in exactly one row. The last share of the rows may be held out. Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mambadsl.build.loss import IGNORE
from mambadsl.data.corpus import Corpus
from mambadsl.data.order import row_of

#: The document number of places without a token.
PADDING = -1


@dataclass(frozen=True)
class Batch:
    """tokens_BT: int64, 0 where padded. targets_BT: int64, each token's successor in its document, that after the row
    for the row's last token; IGNORE at a document's end and at padding. segments_BT: int32, which of the row's
    documents (from 0); -1 where padded."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None


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
        samples = range(first, first + count)
        return self._batch([row_of(sample, count=self.count, seed=self.seed) for sample in samples])

    def held_out(self, first: int, count: int) -> Batch:
        """Held-out rows first .. first + count, in the corpus' order."""
        if not 0 <= first <= first + count <= self.held_out_count:
            raise ValueError(f"{self.held_out_count} rows are held out; first = {first}, count = {count}")
        return self._batch(range(self.count + first, self.count + first + count))

    def _batch(self, rows: Sequence[int]) -> Batch:
        shape = len(rows), self.length
        tokens_BT, targets_BT = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        segments_BT = np.full(shape, PADDING, np.int32)
        for row, tokens_T, targets_T, segments_T in zip(rows, tokens_BT, targets_BT, segments_BT):
            start = row * self.length
            # One more than the row has: the last token's target.
            found = self.corpus.tokens[start : start + self.length + 1]
            real = min(len(found), self.length)
            tokens_T[:real] = found[:real]
            targets_T[: len(found) - 1] = found[1:]
            low, high = np.searchsorted(self.corpus.ends, (start, start + real), side="right")
            stops = self.corpus.ends[low:high] - start
            targets_T[stops - 1] = IGNORE
            lengths = np.diff(stops, prepend=0, append=real)
            segments_T[:real] = np.repeat(np.arange(len(lengths)), lengths)
        return Batch(*map(torch.from_numpy, (tokens_BT, targets_BT, segments_BT)))
