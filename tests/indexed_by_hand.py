"""Megatron's `.bin` and `.idx`, byte by byte from the format."""

from __future__ import annotations

import struct


def by_hand(name, code: int, letter: str, sequences: list[list[int]], bounds: list[int]) -> None:
    n, size = len(sequences), struct.calcsize(f"<{letter}")
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", n, len(bounds))
    index += struct.pack(f"<{n}i", *map(len, sequences))
    at = 0
    for sequence in sequences:
        index += struct.pack("<q", at)
        at += len(sequence) * size
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    ids = b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences)
    name.with_name(name.name + ".idx").write_bytes(index)
    name.with_name(name.name + ".bin").write_bytes(ids)
