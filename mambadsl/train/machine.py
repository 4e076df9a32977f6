"""This machine as the planner sees one: what a large product and a large copy achieve, its memory, the host's time,
the link between two ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from mambadsl.train.clock import Clock
from mambadsl.train.world import World

#: Of a square matrix product, and bytes of a copy.
SIDE = {"cuda": 8192, "cpu": 768}
COPIED = {"cuda": 2**29, "cpu": 2**26}
MICROBATCHES = 16
#: The least that is sent from one rank to the next and back, for the link's bytes per second, and how many times that.
SENT, LONGER = 2**24, 4


@dataclass(frozen=True, slots=True)
class Speeds:
    """As in plan/device.py. Those of the link are None where one process measures: there is none."""

    bf16_flops: float
    bytes_per_s: float
    memory_bytes: int
    action_s: float
    link_bytes_per_s: float | None = None
    link_latency_s: float | None = None
    beside_transfer: float | None = None


def speeds(world: World, dtype: torch.dtype, *, sent: int) -> Speeds:
    """The link is that of the first two ranks of a pipeline. sent: bytes that cross between two stages."""
    device = world.device
    side, copied = SIDE[device.type], COPIED[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    x, y = (torch.ones(copied, dtype=torch.uint8, device=device) for _ in range(2))
    flops = 2 * side**3 / _seconds(lambda: a @ b, device)
    moved = 2 * copied / _seconds(lambda: y.copy_(x), device)
    return Speeds(flops, moved, _memory(device), _action(world), **_link(world, max(sent, SENT)))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    clock, found = Clock(device), []
    for _ in range(8):
        begun = clock.mark()
        work()
        found.append((begun, clock.mark()))
    return median(clock.between(*pair) for pair in found[3:])


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _action(world: World) -> float:
    """Host time of an action of a schedule: of a stage that does next to nothing."""
    device = world.device
    like = torch.empty(1, 1, device="meta", requires_grad=True)
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    stage = PipelineStage(
        nn.Linear(1, 1, device=device), 0, 1, device, input_args=(like,), output_args=(like,), group=alone
    )
    schedule = _PipelineScheduleRuntime(
        [stage], MICROBATCHES, loss_fn=lambda out, target: out.sum(), scale_grads=False
    )
    both = _ComputationType.FORWARD, _ComputationType.FULL_BACKWARD
    order = {0: [_Action(0, kind, mb) for mb in range(MICROBATCHES) for kind in both]}
    schedule.pipeline_order = order
    schedule._prepare_schedule_with_comms(order)
    x = torch.ones(MICROBATCHES, 1, device=device)
    return _seconds(lambda: schedule.step(x, target=x, return_outputs=False), device) / (2 * MICROBATCHES)


def _link(world: World, sent: int) -> dict[str, float]:
    """Between the first two ranks, one way."""
    if world.size == 1:
        return {}
    # NCCL wants every rank of a group at its first use.
    dist.all_reduce(torch.zeros(1, device=world.device), group=world.group("pipeline"))
    # Where next to nothing is sent the host's time is all there is, and more hides it: bytes are the slope beyond.
    few, many, more = (_there_and_back(world, size) for size in (1, sent, LONGER * sent))
    return {"link_latency_s": few / 2, "link_bytes_per_s": 2 * (LONGER - 1) * sent / max(more - many, 1e-9)}


@contextmanager
def awaiting(world: World, sent: int) -> Iterator[None]:
    """Inside, the first rank waits for so many bytes, which the second sends at the end. All ranks come here."""
    x = torch.zeros(max(sent, SENT), dtype=torch.uint8, device=world.device)
    # The two know each other before one of them waits.
    _there_and_back(world, 1)
    coming = _begun(world, dist.irecv, x, 1) if world.rank == 0 else None
    try:
        yield
    finally:
        world.barrier()
        if world.rank == 1:
            _begun(world, dist.isend, x, 0).wait()
        if coming is not None:
            coming.wait()


def _there_and_back(world: World, size: int) -> float:
    x = torch.zeros(size, dtype=torch.uint8, device=world.device)

    def work() -> None:
        if world.rank < 2:
            peer, way = 1 - world.rank, (dist.isend, dist.irecv)
            for send_or_receive in way if world.rank == 0 else way[::-1]:
                _begun(world, send_or_receive, x, peer).wait()

    return _seconds(work, world.device)


def _begun(world: World, way: Callable, x: torch.Tensor, peer: int) -> dist.Work:
    """As pipelines send: in their own group."""
    [work] = dist.batch_isend_irecv([dist.P2POp(way, x, peer, world.group("pipeline"))])
    return work
