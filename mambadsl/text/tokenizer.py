"""Text <-> token ids: bytes for demos, or a `tokenizers` JSON file; and text that comes out as ids come in.

Refuses (ValueError) a vocabulary too small for bytes and a tokenizer without its package or file.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mambadsl.text.spell import nearest

#: What ends a text in published tokenizers; the first that there is.
ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eos|>",
    "[EOS]", "<EOS>",
)


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, whole characters only; the pieces joined are `decode`'s text."""
        ...


def tokenizer(path: str | Path | None = None, *, vocab: int) -> Tokenizer:
    """A tokenizer for a model with `vocab` ids: that of a `tokenizer.json`, or bytes."""
    return Bytes(vocab=vocab) if path is None else JsonFile(path, vocab=vocab)


class Bytes:
    """Byte b of the UTF-8 text is token b. Ids past 255, which a model may write, read as U+FFFD."""

    def __init__(self, *, vocab: int = 256):
        if vocab < 256:
            raise ValueError(f"bytes need a vocabulary of at least 256 ids, and this model has {vocab}")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.pieces(tokens))

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if 0 <= token < 256:
                piece = decoder.decode(bytes([token]))
            else:
                piece = decoder.decode(b"", final=True) + "\N{REPLACEMENT CHARACTER}"
            if piece:
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece


class JsonFile:
    """A `tokenizer.json` as the tokenizers package reads it."""

    def __init__(self, path: str | Path, *, vocab: int):
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise ValueError(f"`{path}` needs the package `tokenizers` (pip install tokenizers)") from error
        if not Path(path).is_file():
            raise ValueError(f"there is no tokenizer file `{path}`")
        try:
            self.loaded = Loaded.from_file(str(path))
        except Exception as error:  # The package raises nothing narrower.
            raise ValueError(f"`{path}` is no tokenizer file: {error}") from None
        size = self.loaded.get_vocab_size()
        if size > vocab:
            raise ValueError(f"the tokenizer has {size} ids and the model {vocab}: vocab = {size} would do")
        # Some files say that a text is cut, or filled up, to a length.
        self.loaded.no_truncation()
        self.loaded.no_padding()

    def encode(self, text: str) -> list[int]:
        return self.loaded.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids; texts side by side, on all cores."""
        return [found.ids for found in self.loaded.encode_batch(texts, add_special_tokens=False)]

    def places(self, texts: Sequence[str]) -> list[list[tuple[int, int, int]]]:
        """Each text's tokens as (first character, that after the last, id)."""
        found = self.loaded.encode_batch(texts, add_special_tokens=False)
        return [[(*span, id) for span, id in zip(one.offsets, one.ids)] for one in found]

    def special(self) -> dict[str, int]:
        """The special tokens' ids, by name."""
        return {token.content: id for id, token in self.loaded.get_added_tokens_decoder().items() if token.special}

    def end_of_text(self) -> str | None:
        """The special token that ends a text, by the names that are usual; None if there is none of them."""
        there = self.special()
        return next((name for name in ENDS if name in there), None)

    def id_of(self, name: str) -> int:
        """The id of a token. ValueError if there is none of that name."""
        id = self.loaded.token_to_id(name)
        if id is None:
            there = self.special()
            near = nearest(name, there)
            known = f"its special tokens are {', '.join(list(there)[:12]) or 'none'}"
            raise ValueError(f"the tokenizer has no token `{name}`; {f'did you mean `{near}`?' if near else known}")
        return id

    @property
    def highest(self) -> int:
        """The highest id."""
        return max(self.loaded.get_vocab().values(), default=0)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.loaded.decode(list(tokens), skip_special_tokens=False)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=False)
        seen: list[int] = []
        given = ""
        for token in tokens:
            seen.append(token)
            if piece := decoder.step(self.loaded, token):
                given += piece
                yield piece
        # A character that never got its last byte.
        if rest := self.decode(seen).removeprefix(given):
            yield rest
