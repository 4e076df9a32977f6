"""Who writes text in the decoding benchmark, all with the same weights: mambadsl, mamba_ssm, transformers.

In: a Program. Out: `Writer`s for a batch, and each one's logits for forced tokens. Models are built when first asked
for.
Letters: B batch, T prompt, n new tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mambadsl.run.decode import Decoder
from rivals.contender import Shape, copy_weights, mamba_kernels
from rivals.mamba_lm import make as make_mamba_lm
from rivals.ours import draw_on_device


@dataclass
class Writer:
    """write: prompts [B, T] on the device and n -> the n greedy tokens of each row, [B, n]. decoder: ours."""

    write: Callable[[Tensor, int], Tensor]
    close: Callable[[], None] = lambda: None
    decoder: Decoder | None = None


#: transformers' Mamba2ForCausalLM -> ours.
BLOCK = "backbone.layers.{i}."
NAMES = {
    "backbone.embeddings.weight": "embed.weight", "backbone.norm_f.weight": "final_norm.weight",
    BLOCK + "norm.weight": "stack.{i}.norm.weight", BLOCK + "mixer.in_proj.weight": "stack.{i}.mixer.in_proj.weight",
    BLOCK + "mixer.conv1d.weight": "stack.{i}.mixer.conv.weight",
    BLOCK + "mixer.conv1d.bias": "stack.{i}.mixer.conv.bias", BLOCK + "mixer.dt_bias": "stack.{i}.mixer.dt_bias",
    BLOCK + "mixer.A_log": "stack.{i}.mixer.A_log", BLOCK + "mixer.D": "stack.{i}.mixer.D",
    BLOCK + "mixer.norm.weight": "stack.{i}.mixer.gate_norm.weight",
    BLOCK + "mixer.out_proj.weight": "stack.{i}.mixer.out_proj.weight",
}


class Models:
    """One model, in every form. parts: our part set."""

    def __init__(self, program: Any, *, device: str, parts: str):
        self.program, self.device, self.parts = program, device, parts

    def ours(self, dtype: str, *, parts: str | None = None) -> Any:
        with patch("mambadsl.build.model.initialise", draw_on_device):
            return self.program.build(parts=parts or self.parts, dtype=dtype, device=self.device).eval()

    @cached_property
    def narrow(self) -> Any:
        """bf16 weights, drawn here; all others have these values."""
        return self.ours("bf16")

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        return dict(self.narrow.named_parameters())

    def exact(self, parts: str) -> Any:
        """float32, of the same values."""
        model = self.ours("fp32", parts=parts)
        model.load_state_dict(self.narrow.state_dict())
        return model

    @cached_property
    def mamba_ssm(self) -> nn.Module:
        return make_mamba_lm(Shape.of(self.program), self.weights, device=self.device).eval()

    @cached_property
    def transformers(self) -> nn.Module:
        if self.device != "cpu":
            mamba_kernels()
        from transformers import Mamba2Config, Mamba2ForCausalLM

        shape = Shape.of(self.program)
        m = shape.mamba2
        config = Mamba2Config(
            num_heads=m.heads, head_dim=m.head_dim, vocab_size=shape.vocab, hidden_size=shape.d_model,
            state_size=m.d_state, num_hidden_layers=len(shape.pattern), layer_norm_epsilon=shape.eps,
            expand=m.heads * m.head_dim // shape.d_model, conv_kernel=m.d_conv, n_groups=m.groups, chunk_size=m.chunk,
            residual_in_fp32=True, tie_word_embeddings=shape.tied, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )
        with torch.device(self.device):
            model = Mamba2ForCausalLM(config)
        model = model.to(device=self.device, dtype=torch.bfloat16).eval()
        copy_weights(model, self.weights, NAMES)
        return model


def mambadsl(state: torch.dtype) -> Callable[[Models, int, int], Writer]:
    def writer(models: Models, batch: int, capacity: int) -> Writer:
        decoder = Decoder(models.narrow, batch=batch, capacity=capacity, state_dtype=state)

        def write(prompts_BT: Tensor, n: int) -> Tensor:
            decoder.prefill(prompts_BT.tolist())
            return torch.cat(list(decoder.blocks(n))).T

        return Writer(write, decoder.close, decoder)

    return writer


def mamba_ssm(models: Models, batch: int, capacity: int) -> Writer:
    model = models.mamba_ssm

    def write(prompts_BT: Tensor, n: int) -> Tensor:
        found_BS = model.generate(prompts_BT, prompts_BT.shape[1] + n, top_k=1, cg=True)
        return found_BS[:, prompts_BT.shape[1] :].cpu()

    def close() -> None:
        # A smaller batch after a larger one would reuse its states, and their sizes.
        model._decoding_cache = None

    return Writer(write, close)


def transformers(models: Models, batch: int, capacity: int, **how: Any) -> Writer:
    model = models.transformers

    @torch.no_grad()
    def write(prompts_BT: Tensor, n: int) -> Tensor:
        found_BS = model.generate(
            prompts_BT, attention_mask=torch.ones_like(prompts_BT), max_new_tokens=n, min_new_tokens=n,
            do_sample=False, **how,
        )
        return found_BS[:, prompts_BT.shape[1] :].cpu()

    return Writer(write)


def transformers_static(models: Models, batch: int, capacity: int) -> Writer:
    """Compiles for minutes: not among the defaults."""
    return transformers(models, batch, capacity, cache_implementation="static")


WRITERS: dict[str, Callable[[Models, int, int], Writer]] = {
    "mambadsl, bf16 state": mambadsl(torch.bfloat16), "mambadsl, fp32 state": mambadsl(torch.float32),
    "mamba_ssm, cg": mamba_ssm, "transformers": transformers, "transformers, static": transformers_static,
}


@torch.no_grad()
def ours_forced(model: Any, tokens_BS: Tensor, prompt: int, *, state: torch.dtype) -> Tensor:
    """Logits [B, n + 1, V] after the prompt and after each of the n forced tokens behind it, one at a time."""
    B, S = tokens_BS.shape
    found = model.init_state(B, capacity=S, state_dtype=state)
    logits = [model(tokens_BS[:, :prompt], state=found, last=1)]
    logits += [model(tokens_BS[:, t : t + 1], state=found, last=1) for t in range(prompt, S)]
    return torch.cat(logits, 1)


@torch.no_grad()
def mamba_ssm_forced(model: nn.Module, tokens_BS: Tensor, prompt: int) -> Tensor:
    from mamba_ssm.utils.generation import InferenceParams

    B, S = tokens_BS.shape
    past = InferenceParams(max_seqlen=S, max_batch_size=B)
    logits = [model(tokens_BS[:, :prompt], inference_params=past, num_last_tokens=1).logits]
    past.seqlen_offset = prompt
    for t in range(prompt, S):
        logits.append(model(tokens_BS[:, t : t + 1], inference_params=past, num_last_tokens=1).logits)
        past.seqlen_offset += 1
    return torch.cat(logits, 1).float()


@torch.no_grad()
def transformers_whole(model: nn.Module, tokens_BS: Tensor, prompt: int) -> Tensor:
    """The same logits from one forward pass over all tokens."""
    return model(tokens_BS, use_cache=False).logits[:, prompt - 1 :].float()
