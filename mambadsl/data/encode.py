"""Texts -> arrays of ids, for files that are written: many documents side by side, or a long one in windows.

A tokenizer reads a long text in windows that overlap. Two neighbours are joined where they have the same tokens: there
neither feels its window's border, so that the ids are those of the whole text. Where they agree nowhere, the two are
read as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from mambadsl.text.tokenizer import Bytes, JsonFile

#: Characters that neighbours have in common.
_OVERLAP = 1 << 13
#: Tokens before and after a seam that must be the same.
_AGREE = 16
#: Windows, documents and characters that are read side by side.
_WINDOWS = 8
_DOCUMENTS = 1024
_CHARACTERS = 1 << 22

Token = tuple[int, int, int]  # (first character, that after the last, id)
#: What ends a document: a token's name, an id, None for nothing, or AUTO: the tokenizer's own, and of bytes nothing.
End = str | int | None
AUTO = "auto"


class Encoder(Protocol):
    #: Of ids in files.
    dtype: str
    #: Two encoders of one name give the same ids.
    name: str
    #: What comes after each document that has a token; None for nothing.
    end: int | None
    #: Of the end, for people.
    says: str | None

    def documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Each text's ids."""
        ...

    def long_document(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of one text that comes in pieces."""
        ...


class ByteEncoder:
    """Byte b of the UTF-8 text is token b. eod: an id that is no byte, if any."""

    def __init__(self, *, vocab: int, eod: End = AUTO):
        Bytes(vocab=vocab)
        self.end = None if eod == AUTO else eod
        if self.end is not None and not (isinstance(self.end, int) and 256 <= self.end < vocab):
            more = f"past the bytes are the ids 256 to {vocab - 1}" if vocab > 256 else "256 ids are the bytes alone"
            raise ValueError(f"documents of bytes cannot end with `{self.end}`: {more}; `none` is the default")
        self.dtype, self.name = ("|u1", "bytes") if self.end is None else (_dtype(self.end), f"bytes, {self.end}")
        self.says = None if self.end is None else f"documents end with the id {self.end}"

    def documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for text in texts:
            yield _ended(np.frombuffer(text.encode("utf-8"), np.uint8), self.end)

    def long_document(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        return _all_ended((np.frombuffer(piece.encode("utf-8"), np.uint8) for piece in pieces), self.end)


class TokenizerEncoder:
    """The ids of a `tokenizer.json`. eod: the token after each document, as `End` says."""

    def __init__(self, path: str | Path, *, vocab: int, eod: End = AUTO):
        self.reader = JsonFile(path, vocab=vocab)
        name = self.reader.end_of_text() if eod == AUTO else eod
        self.end = self.reader.id_of(name) if isinstance(name, str) else name
        if self.end is not None and not 0 <= self.end < vocab:
            raise ValueError(f"documents cannot end with the id {self.end}: the model has ids from 0 to {vocab - 1}")
        self.dtype = _dtype(max(self.reader.highest, self.end or 0))
        self.name = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if self.end is not None:
            self.name += f", {self.end}"
            self.says = f"documents end with {f'`{name}`, ' * isinstance(name, str)}the id {self.end}"
        else:
            why = "the tokenizer has no end of text that is known: " if eod == AUTO else ""
            self.says = f"{why}nothing marks where documents end"

    def documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for some in _batches(texts):
            for ids in self.reader.encode_all(some):
                yield _ended(np.array(ids, np.int64), self.end)

    def long_document(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        return _all_ended(joined(pieces, self.reader.places), self.end)


def _dtype(highest: int) -> str:
    return "<u2" if highest < 2**16 else "<i4"


def _ended(ids: np.ndarray, end: int | None) -> np.ndarray:
    """A document, and its end; of none, nothing."""
    return ids if end is None or not len(ids) else np.append(ids.astype(np.int64), end)


def _all_ended(pieces: Iterable[np.ndarray], end: int | None) -> Iterator[np.ndarray]:
    count = 0
    for ids in pieces:
        count += len(ids)
        yield ids
    if count and end is not None:
        yield np.array([end], np.int64)


def joined(
    pieces: Iterable[str], places: Callable[[list[str]], list[list[Token]]], *, overlap: int = _OVERLAP
) -> Iterator[np.ndarray]:
    """The ids of one text that comes in pieces, in arrays; `places` gives the tokens of texts."""
    held: tuple[int, str, list[Token]] | None = None
    skip = 0  # Tokens of `held` that went out with the window before it.
    windows = _windows(pieces, overlap)
    while some := list(islice(windows, _WINDOWS)):
        for (start, text), tokens in zip(some, places([text for _, text in some])):
            if held is None:
                held = start, text, tokens
                continue
            begun, before, old = held
            seam = _seam(old, tokens, shift=start - begun, end=len(before))
            if seam is not None and seam[0] >= skip:
                yield _ids(old[skip : seam[0]])
                held, skip = (start, text, tokens), seam[1]
            else:
                both = before + text[begun + len(before) - start :]
                [tokens] = places([both])
                held = begun, both, tokens
    if held is not None:
        yield _ids(held[2][skip:])


def _windows(pieces: Iterable[str], overlap: int) -> Iterator[tuple[int, str]]:
    """(first character, text): each piece, and before it what its predecessor ended in."""
    tail, done = "", 0
    for piece in pieces:
        window = tail + piece
        yield done - len(tail), window
        done += len(piece)
        tail = window[-overlap:]


def _seam(old: list[Token], new: list[Token], *, shift: int, end: int) -> tuple[int, int] | None:
    """Where to go over from one window's tokens to the next one's (by their numbers in each): as far from both borders
    as they agree. shift: characters from the first window's start to the second's; end: of the first."""
    low = len(old)
    while low and old[low - 1][0] >= shift:
        low -= 1
    there: dict[Token, int] = {}
    for number, (first, last, id) in enumerate(new):
        if first + shift >= end:
            break
        there.setdefault((first + shift, last + shift, id), number)
    middle = (shift + end) / 2
    for i in sorted(range(low + _AGREE, len(old) - _AGREE), key=lambda i: abs(old[i][0] - middle)):
        j = there.get(old[i])
        if j is None or j < _AGREE:
            continue
        around = [(first + shift, last + shift, id) for first, last, id in new[j - _AGREE : j + _AGREE]]
        if around == old[i - _AGREE : i + _AGREE]:
            return i, j
    return None


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    characters = 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if len(some) == _DOCUMENTS or characters >= _CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _ids(tokens: list[Token]) -> np.ndarray:
    return np.array([id for *_, id in tokens], np.int64)
