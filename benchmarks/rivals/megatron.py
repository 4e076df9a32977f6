"""Megatron-Core's HybridModel with its Transformer Engine spec: one process, one GPU, bf16, its fusions on.

`megatron` has its native fused cross entropy; `megatron te-loss` the same model with Transformer Engine's, which
Megatron warns of; `megatron fp8` tensorwise FP8; `megatron graph` the whole step in one CUDA graph.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rivals.contender import Contender, Shape, Source, copy_weights, mamba_kernels, rival

LAYER = "decoder.layers.{i}."


def names(shape: Shape) -> dict[str, str | Source]:
    norm, mixer = "stack.{i}.norm.weight", "stack.{i}.mixer."
    found: dict[str, str | Source] = {
        "embedding.word_embeddings.weight": "embed.weight", "decoder.final_norm.weight": "final_norm.weight",
        "output_layer.weight": "head.weight",
        LAYER + "mixer.in_proj.layer_norm_weight": norm,
        LAYER + "mixer.in_proj.weight": mixer + "in_proj.weight",
        LAYER + "mixer.conv1d_weight": mixer + "conv.weight", LAYER + "mixer.conv1d_bias": mixer + "conv.bias",
        LAYER + "mixer.dt_bias": mixer + "dt_bias", LAYER + "mixer.A_log": mixer + "A_log",
        LAYER + "mixer.D": mixer + "D", LAYER + "mixer.norm.weight": mixer + "gate_norm.weight",
        LAYER + "mixer.out_proj.weight": mixer + "out_proj.weight",
        LAYER + "mlp.linear_fc1.layer_norm_weight": norm,
        LAYER + "mlp.linear_fc1.weight": mixer + "up_proj.weight",
        LAYER + "mlp.linear_fc2.weight": mixer + "down_proj.weight",
        LAYER + "self_attention.linear_qkv.layer_norm_weight": norm,
        LAYER + "self_attention.linear_proj.weight": mixer + "o_proj.weight",
    }
    if f := shape.attention:
        def by_group(t: Tensor) -> Tensor:
            """[q | k | v] -> for each key/value head: its query heads, its key head, its value head."""
            q, k, v = t.split([f.heads * f.head_dim, f.kv_heads * f.head_dim, f.kv_heads * f.head_dim])
            grouped = [part.unflatten(0, (f.kv_heads, -1)) for part in (q, k, v)]
            return torch.cat(grouped, 1).flatten(0, 1)

        found[LAYER + "self_attention.linear_qkv.weight"] = Source(mixer + "qkv_proj.weight", by_group)
    return found


def build(
    shape: Shape, weights: Mapping[str, Tensor], *, device: str, length: int, fp8: bool = False,
    graph: bool = False, **_,
) -> list[Contender]:
    if device == "cpu":
        raise RuntimeError("Megatron-Core's Transformer Engine spec runs on CUDA only")
    mamba_kernels()
    _one_process(graph=graph)
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    how = config(shape, **(dict(fp8="hybrid", fp8_recipe="tensorwise") if fp8 else {}))
    model = HybridModel(
        config=how, hybrid_stack_spec=hybrid_stack_spec, vocab_size=shape.vocab, max_sequence_length=length,
        hybrid_layer_pattern=shape.pattern, share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="none", parallel_output=True,
    ).cuda().train()
    copy_weights(model, weights, names(shape))
    embedding = model.embedding.word_embeddings.weight

    def loss_with(implementation: str):
        def loss(tokens_BT: Tensor) -> Tensor:
            how.cross_entropy_fusion_impl = implementation
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
            # The last token has no successor: its label is any, and does not count.
            loss_BT = model(tokens_BT, positions_BT, None, labels=tokens_BT.roll(-1, 1))
            return loss_BT[:, :-1].float().mean()

        return loss

    if graph:
        from mambadsl.run.step import TrainStep

        step = TrainStep(_WithLoss(model, loss_with("native")), graph=True)
        parameters = list(model.parameters())
        return [Contender("megatron graph", step.step, parameters, embedding, False, True, step.close)]
    if fp8:
        return [rival("megatron fp8", model, loss_with("native"), embedding)]
    return [
        rival("megatron", model, loss_with("native"), embedding),
        rival("megatron te-loss", model, loss_with("te"), embedding),
    ]


def config(shape: Shape, **more):
    """A TransformerConfig. more: of its fields."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    m, a, f = shape.mamba2, shape.attention, shape.mlp
    return TransformerConfig(
        num_layers=len(shape.pattern), hidden_size=shape.d_model, ffn_hidden_size=f.d_ff,
        num_attention_heads=a.heads, num_query_groups=a.kv_heads, kv_channels=a.head_dim,
        mamba_num_heads=m.heads, mamba_head_dim=m.head_dim, mamba_state_dim=m.d_state, mamba_num_groups=m.groups,
        is_hybrid_model=True, activation_func=squared_relu, gated_linear_unit=False, add_bias_linear=False,
        normalization="RMSNorm", layernorm_epsilon=shape.eps, hidden_dropout=0.0, attention_dropout=0.0,
        bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, perform_initialization=False,
        bias_dropout_fusion=True, cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native",
        **more,
    )


def _one_process(*, graph: bool) -> None:
    """Megatron's process groups, of one rank; NCCL talks to nobody but itself."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        here = torch.device("cuda", torch.cuda.current_device())
        torch.distributed.init_process_group("nccl", init_method=address, rank=0, world_size=1, device_id=here)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=graph, force_reset_rng=True)


class _WithLoss(nn.Module):
    """Their model with the methods that `TrainStep` calls."""

    def __init__(self, model: nn.Module, loss):
        super().__init__()
        self.model, self._loss = model, loss

    def loss(self, tokens_BT: Tensor) -> Tensor:
        return self._loss(tokens_BT)

    def sublayers(self) -> tuple:
        return ()
