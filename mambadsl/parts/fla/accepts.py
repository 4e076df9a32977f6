"""What flash-linear-attention's parts cannot do: reasons, none where a part fits the request. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mambadsl.parts.part import Request


def conv(request: Request) -> Iterator[str]:
    """Any number of channels, any number of taps."""
    yield from ()
