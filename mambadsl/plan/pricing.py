"""What a split costs: durations for the simulator, peak memory for the limit.

In: a `Program`, a `Chain`, a device. Out: for cut positions, the duration vector (picoseconds) and each
rank's peak bytes.

Peak of a rank: static bytes of its stages; at the worst moment of its order, the activations of all
microbatches kept; the largest working set; and receive buffers, one for every microbatch over every boundary
to another rank, activations in and gradients back (torch allocates them all at the start and keeps them).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mambadsl.plan.chain import Chain, picoseconds
from mambadsl.plan.device import Device
from mambadsl.plan.partition import Room
from mambadsl.plan.schedule import BACKWARD
from mambadsl.plan.simulate import Program


class Pricing:
    """Costs of splits of one chain under one program. `limit`: bytes on each rank. `beside`: as of the device."""

    def __init__(
        self, program: Program, chain: Chain, *, device: Device, microbatches: int, limit: float
    ) -> None:
        self.program, self.chain, self.limit, self.microbatches = program, chain, limit, microbatches
        places = program.rank_of_stage
        self.remote = [a != b for a, b in itertools.pairwise(places)]
        self.beside = device.beside_transfer
        self._action = picoseconds(device.action_s)
        self._whole = BACKWARD in program.kinds
        self._times: dict[tuple[int, int], tuple[float, float, float]] = {}

    def durations(self, cuts: Sequence[int]) -> list[float]:
        """One slot for each kind and stage, then one for each boundary."""
        vector = [0.0] * self.program.slots
        self.revise(vector, cuts, 0, self.program.stages)
        return vector

    def revise(self, vector: list[float], cuts: Sequence[int], first: int, last: int) -> None:
        """Writes the stages `first` to `last` (exclusive) and the boundaries after them anew."""
        stages, times, transfer, remote = self.program.stages, self._times, self.chain.transfer, self.remote
        lanes = len(self.program.kinds) * stages
        for stage in range(first, last):
            a, b = key = cuts[stage], cuts[stage + 1]
            found = times.get(key) or self._time(key)
            if self._whole:
                vector[stage], vector[stages + stage] = found[:2]
            else:
                vector[stage], vector[stages + stage], vector[2 * stages + stage] = found
            if stage < stages - 1 and remote[stage]:
                vector[lanes + stage] = transfer[b]

    def _time(self, key: tuple[int, int]) -> tuple[float, float, float]:
        part, host = self.chain.segment(*key), self._action
        if self._whole:
            found = part.forward + host, part.backward_input + part.backward_weight + host, 0.0
        else:
            found = part.forward + host, part.backward_input + host, part.backward_weight + host
        self._times[key] = found
        return found

    def peaks(self, cuts: Sequence[int]) -> list[int]:
        """Bytes that each rank needs at its worst moment."""
        parts = [self.chain.segment(a, b) for a, b in itertools.pairwise(cuts)]
        found = []
        for here, live in zip(self.program.local_stages, self.program.live):
            mine = [parts[s] for s in here]
            kept = max([sum([n * p.activation_bytes for n, p in zip(counts, mine)]) for counts in live])
            fixed = sum([p.static_bytes for p in mine]) + max([p.working_bytes for p in mine])
            found.append(fixed + kept + sum([self.buffer_bytes(cuts, s) for s in here]))
        return found

    def buffer_bytes(self, cuts: Sequence[int], stage: int) -> int:
        """Receive buffers of a stage, over boundaries to other ranks."""
        size = self.chain.cut_bytes
        into = size[cuts[stage]] if stage and self.remote[stage - 1] else 0
        back = size[cuts[stage + 1]] if stage < self.program.stages - 1 and self.remote[stage] else 0
        return self.microbatches * (into + back)

    def overflow(self, cuts: Sequence[int]) -> float:
        """Bytes over the limit, summed over ranks."""
        return sum([max(0, peak - self.limit) for peak in self.peaks(cuts)])

    def room(self) -> Room:
        """The memory limit for a single stage: exact with one stage a rank; with several, each stage may have
        an equal share of its rank's limit, which is a guess that the search then repairs."""
        program, chain = self.program, self.chain
        kept = [0] * program.stages
        for here, live in zip(program.local_stages, program.live):
            for n, stage in enumerate(here):
                kept[stage] = max(counts[n] for counts in live)

        def solid(stage: int, a: int, b: int) -> int:
            part = chain.segment(a, b)
            return part.static_bytes + kept[stage] * part.activation_bytes + part.working_bytes

        edge = [self.microbatches * n if len(program.local_stages) > 1 else 0 for n in chain.cut_bytes]
        return Room(solid, edge, self.limit / len(program.local_stages[0]))
