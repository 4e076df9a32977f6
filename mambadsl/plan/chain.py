"""The units as a chain that can be cut: prefix sums, so that any stage's cost is a few subtractions.

In: units in chain order, and what a byte over the link costs. Out: `Chain`. Positions count legal cuts, from
0 (before the first unit) to `chain.blocks` (after the last); what lies between two neighbours is never cut.

Times become whole picoseconds, kept in floats: sums of whole numbers below 2**53 are exact in any order, so
ties are real ties and every machine finds the same plan.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from mambadsl.plan.device import Device
from mambadsl.plan.unit import Unit

PICOSECONDS = 1e12


def picoseconds(seconds: float) -> float:
    return float(round(seconds * PICOSECONDS))


class Segment(NamedTuple):
    """What a stage made of some blocks costs; times in picoseconds for one microbatch."""

    forward: float
    backward_input: float
    backward_weight: float
    static_bytes: int
    activation_bytes: int
    working_bytes: int


class Chain:
    """The units between every two legal cuts, summed. `only`: these unit indices are the cuts allowed."""

    def __init__(self, units: Sequence[Unit], *, device: Device, only: Sequence[int] | None = None) -> None:
        self.units = tuple(units)
        if only is None:
            only = [k for k in range(1, len(units)) if units[k - 1].can_cut_after]
        legal = list(only)
        self.positions = [0, *legal, len(units)]
        self.blocks = len(self.positions) - 1
        self.forward = self._sums([picoseconds(u.forward_s) for u in units])
        self.backward_input = self._sums([picoseconds(u.backward_input_s) for u in units])
        self.backward_weight = self._sums([picoseconds(u.backward_weight_s) for u in units])
        self.total = [sum(t) for t in zip(self.forward, self.backward_input, self.backward_weight)]
        self.static = self._sums([u.static_bytes for u in units])
        self.activation = self._sums([u.activation_bytes for u in units])
        self.cut_bytes = [0, *(units[k - 1].out_bytes for k in legal), 0]
        self.transfer = [
            picoseconds(device.link_latency_s + n / device.link_bytes_per_s) if 0 < k < self.blocks else 0.0
            for k, n in enumerate(self.cut_bytes)
        ]
        self._working = [
            max((u.working_bytes for u in units[a:b]), default=0)
            for a, b in zip(self.positions, self.positions[1:])
        ]
        self._shared = self._owners()
        self._segments: dict[tuple[int, int], Segment] = {}

    def segment(self, a: int, b: int) -> Segment:
        """The stage from position a to position b."""
        found = self._segments.get((a, b))
        if found is None:
            found = self._segments[a, b] = Segment(
                self.forward[b] - self.forward[a],
                self.backward_input[b] - self.backward_input[a],
                self.backward_weight[b] - self.backward_weight[a],
                self.static[b] - self.static[a] + self.shared_bytes(a, b),
                self.activation[b] - self.activation[a],
                max(self._working[a:b], default=0),
            )
        return found

    def shared_bytes(self, a: int, b: int) -> int:
        """Weights with several users, once each if a user is in the stage."""
        return sum(
            size
            for size, blocks in self._shared
            if (k := bisect_left(blocks, a)) < len(blocks) and blocks[k] < b
        )

    def unit_cuts(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Positions as unit indices: stage s holds units cuts[s] to cuts[s + 1]."""
        return tuple(self.positions[k] for k in cuts)

    def _sums(self, values: list) -> list:
        sums = list(accumulate(values, initial=0))
        return [sums[k] for k in self.positions]

    def _owners(self) -> list[tuple[int, list[int]]]:
        users: dict[str, tuple[int, list[int]]] = {}
        for block, (a, b) in enumerate(zip(self.positions, self.positions[1:])):
            for unit in self.units[a:b]:
                if unit.owner is not None:
                    size, blocks = users.get(unit.owner, (0, []))
                    if not blocks or blocks[-1] != block:
                        blocks.append(block)
                    users[unit.owner] = max(size, unit.shared_bytes), blocks
        return [users[name] for name in sorted(users)]
