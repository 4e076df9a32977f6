"""Files of text and of tokens as one sequence of token ids.

In: paths of files and folders. Out: `Corpus`. Refuses (ValueError, with file and place) what is not there, is empty,
damaged or no UTF-8 text, and ids that the model does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mambadsl.data import texts
from mambadsl.data.cache import Cache, Stamp, usual_folder
from mambadsl.data.encode import AUTO, ByteEncoder, Encoder, End, TokenizerEncoder
from mambadsl.data.files import files
from mambadsl.data.ids import hold
from mambadsl.data.indexed import read_indexed, write_indexed
from mambadsl.data.tokens import Piece, Tokens


@dataclass(frozen=True)
class Corpus:
    """tokens: the ids of all documents, one document after another; a slice is an int64 array. ends: int64, where each
    document ends (exclusive), ascending; the last is len(tokens). A document without a token is none. says: what ends
    documents of text, if they were encoded."""

    tokens: Tokens
    ends: np.ndarray
    says: str | None = None


def open_corpus(
    paths: str | Path | Iterable[str | Path], *, vocab: int, tokenizer: str | Path | None = None, eod: End = AUTO,
    field: str = "text", cache: Path | None = None,
) -> Corpus:
    """The corpus in files, read where they lie, in the order given.

    By suffix: `.jsonl` and `.ndjson`, an object a line, `field` of each a document; `.bin` with `.idx`, Megatron's
    indexed datasets; `.npy`, ids in one dimension, a document; any other file is UTF-8 text, a document. A folder is
    all files below it. Text becomes ids by a `tokenizer.json`, or its bytes do; after each document of text comes `eod`
    (a token's name, an id, None; "auto": the tokenizer's end of text). What has to be encoded is, once, into the folder
    `cache` (default: `mambadsl` in the user's folder of caches). vocab: how many ids the model has.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    kept = Cache(Path(cache) if cache is not None else usual_folder())
    reading = Reading(vocab, tokenizer, eod, field, kept)
    found: list[tuple[Piece, np.ndarray]] = []
    try:
        for path in files(paths, cache=kept.folder):
            piece, ends = _READERS.get(path.suffix.lower(), _text)(path, reading)
            if not piece.count:
                raise ValueError(f"`{path}` is empty: it has no token")
            found.append((piece, ends))
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"`{error.filename or kept.folder}` cannot be read or written: {why}") from error
    tokens = Tokens([piece for piece, _ in found])
    starts = tokens.stops - [piece.count for piece in tokens.pieces]
    ends = np.concatenate([ends + start for (_, ends), start in zip(found, starts)])
    encoder = vars(reading).get("encoder")
    return Corpus(tokens, ends, encoder and encoder.says)


@dataclass(frozen=True)
class Reading:
    """What files are read with, besides themselves."""

    vocab: int
    tokenizer: str | Path | None
    eod: End
    field: str
    cache: Cache

    @cached_property
    def encoder(self) -> Encoder:
        if self.tokenizer is None:
            return ByteEncoder(vocab=self.vocab, eod=self.eod)
        return TokenizerEncoder(self.tokenizer, vocab=self.vocab, eod=self.eod)


def _text(path: Path, reading: Reading) -> tuple[Piece, np.ndarray]:
    encoder, stamp = reading.encoder, Stamp.of(path)
    if encoder.dtype != "|u1":
        return _encoded(stamp, reading, "text", lambda: [encoder.long_document(texts.pieces_of(path))])
    reading.cache.fact(stamp, "UTF-8", find=lambda: texts.check(path))
    return _one(Piece.at(path, "|u1", stamp.bytes))


def _json_lines(path: Path, reading: Reading) -> tuple[Piece, np.ndarray]:
    def documents() -> Iterable[Iterable[np.ndarray]]:
        found = texts.json_texts(path, field=reading.field)
        return ([ids] for ids in reading.encoder.documents(found))

    return _encoded(Stamp.of(path), reading, f"json {reading.field}", documents)


def _encoded(
    stamp: Stamp, reading: Reading, how: str, documents: Callable[[], Iterable[Iterable[np.ndarray]]]
) -> tuple[Piece, np.ndarray]:
    encoder = reading.encoder

    def make(name: Path) -> None:
        write_indexed(name, documents(), dtype=encoder.dtype, before_end=stamp.hold)

    name = reading.cache.made(stamp, how, encoder.name, last=".idx", make=make)
    piece, ends = read_indexed(name)
    hold(piece, vocab=reading.vocab, cache=reading.cache)
    return piece, ends


def _indexed(path: Path, reading: Reading) -> tuple[Piece, np.ndarray]:
    piece, ends = read_indexed(path.with_suffix(""))
    hold(piece, vocab=reading.vocab, cache=reading.cache)
    return piece, ends


def _numpy(path: Path, reading: Reading) -> tuple[Piece, np.ndarray]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"`{path}` is damaged, or no file of numpy's: {error}") from None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "iu":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"`{path}` must have whole numbers in one dimension, not {found}")
    piece = Piece.at(path, array.dtype.str, len(array), offset=array.offset)
    hold(piece, vocab=reading.vocab, cache=reading.cache)
    return _one(piece)


def _one(piece: Piece) -> tuple[Piece, np.ndarray]:
    """A file that is one document."""
    return piece, np.array([piece.count], np.int64)


_READERS = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".bin": _indexed, ".idx": _indexed, ".npy": _numpy,
}
