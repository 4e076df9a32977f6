"""Megatron-Core's HybridModel trained over several GPUs, on the rows, initial weights and rates of one of our runs.

Under torchrun as a module, from `scale.py`: the same cuts of a pipeline (its 1F1B), its distributed optimizer over
data ranks with gathering and reducing overlapped, bf16 with float32 masters and gradients. Writes a log.jsonl as
`mambadsl train` does.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import mambadsl
from mambadsl.build.init import draw
from mambadsl.build.loss import IGNORE
from mambadsl.data.corpus import open_corpus
from mambadsl.data.rows import Rows
from mambadsl.graph.weights import all_weights
from rivals.contender import Shape, copy_weights, mamba_kernels
from rivals.megatron import config, names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=Path, required=True, help="folder of our run: rates and losses are read there")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("length", "batch", "microbatch", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--cuts", default="", help="layers at which stages after the first begin: 24 or 12,24,36")
    return parser.parse_args()


class Ranks:
    """Model, optimizer and schedule of one rank. Letters: B rows, T time, V stages."""

    def __init__(self, given: argparse.Namespace):
        from megatron.core import parallel_state as mpu
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed import finalize_model_grads as finalize
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
        from megatron.core.models.hybrid.hybrid_model import HybridModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        self.given = given
        cuts = [int(cut) for cut in given.cuts.split(",") if cut]
        mpu.initialize_model_parallel(
            pipeline_model_parallel_size=len(cuts) + 1, create_gloo_process_groups=False
        )
        model_parallel_cuda_manual_seed(1234)
        self.first, self.last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
        self.data_rank, self.data_ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        self.last_rank = mpu.get_pipeline_model_parallel_last_rank()

        program = mambadsl.load(given.model)
        shape = Shape.of(program)
        begins = [0, *cuts, len(shape.pattern)]
        stages_V = [shape.pattern[a:b] for a, b in zip(begins, begins[1:])]
        how = config(shape, pipeline_model_parallel_size=len(stages_V), finalize_model_grads_func=finalize)
        model = HybridModel(
            config=how, hybrid_stack_spec=hybrid_stack_spec, vocab_size=shape.vocab, max_sequence_length=given.length,
            hybrid_layer_pattern="|".join(stages_V), share_embeddings_and_output_weights=shape.tied,
            pre_process=self.first, post_process=self.last, position_embedding_type="none", parallel_output=True,
        ).cuda().train()
        offset = begins[mpu.get_pipeline_model_parallel_rank()]
        copy_weights(model, Drawn(program.layers, seed=given.seed), names(shape), first_layer=offset)
        # Gathering overlaps with the next forward pass only where there is somebody to gather from.
        several = self.data_ranks > 1
        reducing = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=several, overlap_param_gather=several,
            use_distributed_optimizer=True,
        )
        self.model = DistributedDataParallel(how, reducing, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8,
                clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True,
                overlap_param_gather=several,
            ),
            [self.model], use_gloo_process_groups=False,
        )
        how.grad_scale_func = self.optimizer.scale_loss
        how.no_sync_func = self.model.no_sync
        self.schedule = get_forward_backward_func()
        corpus = open_corpus([given.data], vocab=shape.vocab)
        self.rows = Rows(corpus, length=given.length, seed=given.seed)

    def step(self, number: int, lr: float) -> float:
        """The loss of the step."""
        given, each = self.given, self.given.batch // self.data_ranks
        batch = self.rows.training(number * given.batch + self.data_rank * each, each)
        microbatches = each // given.microbatch
        cut = zip(
            batch.tokens_BT.cuda(non_blocking=True).chunk(microbatches),
            batch.targets_BT.cuda(non_blocking=True).chunk(microbatches),
        )
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = self.schedule(
            forward_step_func=self.forward, data_iterator=cut, model=[self.model], num_microbatches=microbatches,
            seq_length=given.length, micro_batch_size=given.microbatch, forward_only=False,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        loss = torch.stack([one["loss"] for one in found]).mean() if self.last else torch.zeros((), device="cuda")
        dist.all_reduce(loss)
        return loss.item() / self.data_ranks

    def forward(self, cut, model):
        tokens_BT, targets_BT = next(cut)
        positions_BT = torch.arange(tokens_BT.shape[1], device="cuda").expand_as(tokens_BT)
        loss_BT = model(tokens_BT, positions_BT, None, labels=targets_BT.clamp_min(0))
        return loss_BT, partial(_mean, targets_BT != IGNORE)


class Drawn(dict):
    """Our initial weights by path, drawn when asked for."""

    def __init__(self, graph, *, seed: int):
        super().__init__()
        self.graph, self.seed, self.weights = graph, seed, all_weights(graph)

    def __missing__(self, path: str) -> Tensor:
        return draw(self.weights[path], self.graph, path=path, seed=self.seed)


def _mean(counts_BT: Tensor, loss_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (loss_BT.float() * counts_BT).sum() / counts_BT.sum()
    return loss, {"loss": loss.detach().clone()}


def main() -> int:
    given = arguments()
    faulthandler.register(signal.SIGTERM, chain=True)
    mamba_kernels()
    torch.cuda.set_device(rank := int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    ranks = Ranks(given)
    beside = [json.loads(line) for line in (given.beside / "log.jsonl").read_text().splitlines()]
    beside = [line for line in beside if "step_s" in line and "loss" in line]
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "log.jsonl").open("a") if rank == 0 else open("/dev/null", "w") as log:
        for number, ours in enumerate(beside):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            loss = ranks.step(number, ours["lr"])
            torch.cuda.synchronize()
            took = time.perf_counter() - begun
            memory = torch.cuda.max_memory_allocated()
            told = dict(step=number + 1, loss=loss, beside=ours["loss"], step_s=took, memory_bytes=memory,
                        tokens_per_s=given.batch * given.length / took)
            log.write(json.dumps(told) + "\n")
            log.flush()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
