"""Files of text and of tokens as one sequence of token ids.

In: paths of files and folders. Out: `Corpus`. Refuses (ValueError, with file and place) what is not there, is empty,
damaged or no UTF-8 text, and ids that the model does not have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambadsl.data.tokens import Piece, Tokens


@dataclass(frozen=True)
class Corpus:
    """tokens: the ids of all documents, one document after another; a slice is an int64 array. ends: int64, where each
    document ends (exclusive), ascending; the last is len(tokens)."""

    tokens: Tokens
    ends: np.ndarray


def open_corpus(
    paths: str | Path | Iterable[str | Path], *, vocab: int, tokenizer: str | Path | None = None, field: str = "text",
    cache: Path | None = None,
) -> Corpus:
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    pieces = [Piece(path, "|u1", path.stat().st_size) for path in paths]
    tokens = Tokens(pieces)
    return Corpus(tokens, tokens.stops)
