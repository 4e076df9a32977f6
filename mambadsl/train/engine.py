"""The forwards and backwards of a step: through the whole model, or as a pipeline's schedule says.

In: the rank's rows of a step. Out: the rank's share of the loss; gradients are left in the weights. The schedules are
the planner's own lists of actions, run by torch.distributed.pipelining.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from mambadsl.build.model import DTYPES
from mambadsl.build.stage import stages
from mambadsl.data.rows import Batch
from mambadsl.graph.graph import LayerGraph
from mambadsl.plan.plan import Plan
from mambadsl.plan.schedule import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, SCHEDULES, rank_of
from mambadsl.train.pieces import Piece, between, piece
from mambadsl.train.settings import Settings
from mambadsl.train.sharding import regathers
from mambadsl.train.world import World


class Engine(Protocol):
    pieces: list[Piece]

    def forward_backward(self, batch: Batch, counts_K: Tensor) -> Tensor:
        """The share of the loss of these rows, float32; 0 on ranks without the head."""
        ...

    def evaluate(self, batch: Batch, counts_K: Tensor) -> Tensor:
        """The same without gradients."""
        ...


class Whole:
    """All layers on every rank."""

    def __init__(self, graph: LayerGraph, world: World, settings: Settings):
        [stage] = stages(graph, [[node.path for node in graph.nodes]])
        self.pieces = [piece(graph, stage, world, settings)]
        self.microbatch = settings.rows(world.ranks("data"))[1]
        self.regathers = regathers(settings, data=world.ranks("data"))

    def forward_backward(self, batch: Batch, counts_K: Tensor) -> Tensor:
        return self._run(batch, counts_K, train=True)

    @torch.no_grad()
    def evaluate(self, batch: Batch, counts_K: Tensor) -> Tensor:
        return self._run(batch, counts_K, train=False)

    def _run(self, batch: Batch, counts_K: Tensor, *, train: bool) -> Tensor:
        [made] = self.pieces
        made.train(train)
        made.counts_K = counts_K
        tensors = batch.tokens_BT, batch.targets_BT, batch.segments_BT
        count = len(batch.tokens_BT) // self.microbatch
        parts = [[None] * count if t is None else t.split(self.microbatch) for t in tensors]
        total = torch.zeros((), device=batch.tokens_BT.device)
        for k, (tokens_BT, targets_BT, segments_BT) in enumerate(zip(*parts)):
            if isinstance(made, FSDPModule):
                last = k == len(parts[0]) - 1
                made.set_requires_gradient_sync(last)
                made.set_reshard_after_backward(last or self.regathers)
            share = made(tokens_BT, targets_BT=targets_BT, segments_BT=segments_BT)
            if train:
                share.backward()
            total += share.detach()
        return total


_KINDS = {
    FORWARD: _ComputationType.FORWARD, BACKWARD: _ComputationType.FULL_BACKWARD,
    BACKWARD_INPUT: _ComputationType.BACKWARD_INPUT, BACKWARD_WEIGHT: _ComputationType.BACKWARD_WEIGHT,
}
_FORWARD = {
    _ComputationType.FORWARD, _ComputationType.SEND_F, _ComputationType.RECV_F, _ComputationType.UNSHARD,
    _ComputationType.RESHARD,
}


def _examples(
    graph: LayerGraph, names: tuple[str, ...], streams: int, *, rows: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What crosses between stages, without memory; else torch would run every stage once, on nothing, to see it."""
    crossing = between(graph, dtype, streams=streams)
    made = {name: ((rows, length, *shape), kind) for name, (shape, kind) in crossing.items()}
    made |= {"tokens": ((rows, length), torch.int64), "logits": ((), torch.float32)}
    return tuple(
        torch.empty(size, dtype=kind, device="meta", requires_grad=kind.is_floating_point)
        for size, kind in map(made.__getitem__, names)
    )


class Pipelined:
    """The stages of a plan on the ranks of the pipeline."""

    def __init__(self, graph: LayerGraph, plan: Plan, world: World, settings: Settings):
        self.world, self.plan = world, plan
        each, micro = settings.rows(world.ranks("data"))
        self.microbatches = each // micro
        cut = stages(graph, [part.paths for part in plan.stages])
        mine = [s for s in cut if rank_of(plan.placement, plan.ranks, s.index) == world.at("pipeline")]
        puts_off = BACKWARD_WEIGHT in SCHEDULES[plan.schedule].kinds
        self.pieces = [piece(graph, s, world, settings, puts_off=puts_off) for s in mine]
        group, device = world.group("pipeline"), world.device
        examples = partial(_examples, graph, rows=micro, length=settings.length, dtype=DTYPES[settings.dtype])
        held = [
            PipelineStage(
                made, s.index, len(cut), device, group=group,
                input_args=examples(s.takes, graph.streams[s.paths[0]].read),
                output_args=examples(s.gives, graph.streams[s.paths[-1]].given),
                dw_builder=made.deferred and made.deferred.take,
            )
            for made, s in zip(self.pieces, mine)
        ]
        self.first, self.last = any(s.index == 0 for s in mine), any(s.index == len(cut) - 1 for s in mine)
        self.schedule = _PipelineScheduleRuntime(
            held, self.microbatches, loss_fn=lambda share, target: share, scale_grads=False
        )
        orders = {
            rank: [_Action(stage, _KINDS[kind], mb) for kind, stage, mb in order]
            for rank, order in enumerate(plan.orders())
        }
        self.schedule._prepare_schedule_with_comms(orders)
        whole = self.schedule.pipeline_order_with_comms
        # torch's own evaluation skips the work of a backward action, but in a V not what it hands on.
        forward = {rank: [a for a in order if a.computation_type in _FORWARD] for rank, order in whole.items()}
        self.orders = {True: whole, False: forward}

    def forward_backward(self, batch: Batch, counts_K: Tensor) -> Tensor:
        return self._run(batch, counts_K, self.schedule.step, train=True)

    def evaluate(self, batch: Batch, counts_K: Tensor) -> Tensor:
        return self._run(batch, counts_K, self.schedule.eval, train=False)

    def _run(self, batch: Batch, counts_K: Tensor, run, *, train: bool) -> Tensor:
        for made in self.pieces:
            made.train(train)
            made.counts_K = counts_K
        self.schedule.pipeline_order_with_comms = self.orders[train]
        shares: list[Tensor] = []
        how = dict(targets_BT=batch.targets_BT, segments_BT=batch.segments_BT)
        ends = dict(target=batch.targets_BT, losses=shares) if self.last else {}
        run(*((batch.tokens_BT,) if self.first else ()), **how, **ends, return_outputs=False)
        zero = torch.zeros((), device=batch.tokens_BT.device)
        return torch.stack([share.detach() for share in shares]).sum() if shares else zero


def engine(graph: LayerGraph, world: World, settings: Settings, plan: Plan | None) -> Engine:
    return Whole(graph, world, settings) if plan is None else Pipelined(graph, plan, world, settings)
