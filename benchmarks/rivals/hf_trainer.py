"""Hugging Face's Mamba2ForCausalLM, trained by its Trainer on the rows that `mambadsl train` would take.

    python benchmarks/rivals/hf_trainer.py JSON

In: one JSON object (`learn.py` writes it). Out: the last line, a JSON object. Trainer's own defaults hold for all that
is not in the object, so its AdamW is torch's fused one, and it decides what decays.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from mambadsl.build.loss import IGNORE
from mambadsl.data.corpus import open_corpus
from mambadsl.data.rows import Batch, Rows


class Clock(TrainerCallback):
    """Seconds of each step, from its batch to the end of the update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)


def loss(outputs: Any, labels_BT: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Of targets, which are successors already."""
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE)


def examples(batch: Batch) -> list[dict[str, Tensor]]:
    return [dict(input_ids=x_T, labels=y_T) for x_T, y_T in zip(batch.tokens_BT, batch.targets_BT)]


@torch.no_grad()
def held_out(model: Mamba2ForCausalLM, rows: Rows, *, batch: int) -> float:
    """Mean over all tokens that have a successor."""
    model.eval()
    total, tokens = 0.0, 0
    for first in range(0, rows.held_out_count, batch):
        found = rows.held_out(first, min(batch, rows.held_out_count - first))
        logits_BTV = model(input_ids=found.tokens_BT).logits
        total += F.cross_entropy(logits_BTV.flatten(0, 1), found.targets_BT.flatten(), reduction="sum").item()
        tokens += (found.targets_BT != IGNORE).sum().item()
    return total / tokens


def main(given: dict[str, Any]) -> dict[str, Any]:
    steps, batch = given["steps"], given["batch"]
    torch.manual_seed(given["seed"])
    config = Mamba2Config(**given["config"])
    corpus = open_corpus(given["data"], vocab=config.vocab_size)
    rows = Rows(corpus, length=given["length"], seed=given["seed"], held_out=given["held_out"])
    model, clock = Mamba2ForCausalLM(config), Clock()
    how = TrainingArguments(
        output_dir=given["folder"], max_steps=steps, per_device_train_batch_size=batch, learning_rate=given["lr"],
        warmup_steps=given["warmup"], lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs=dict(min_lr_rate=given["floor"]), weight_decay=given["weight_decay"],
        adam_beta1=given["betas"][0], adam_beta2=given["betas"][1], adam_epsilon=given["eps"],
        max_grad_norm=given["clip"], seed=given["seed"], train_sampling_strategy="sequential", use_cpu=True, bf16=False,
        save_strategy="no", logging_steps=100, report_to="none", dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model, args=how, train_dataset=examples(rows.training(0, steps * batch)),
        data_collator=default_data_collator, compute_loss_func=loss, callbacks=[clock],
    )
    trainer.train()
    return dict(held_out=held_out(model, rows, batch=batch), step_s=statistics.median(clock.seconds[3:]))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
