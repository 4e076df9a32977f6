"""mamba_ssm's own MambaLMHeadModel: bf16 weights, its fused add and norm, cross entropy of float32 logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.contender import Contender, Shape, copy_weights, mamba_kernels, rival

LAYER = "backbone.layers.{i}."
NAMES = {
    "backbone.embedding.weight": "embed.weight", "backbone.norm_f.weight": "final_norm.weight",
    "lm_head.weight": "head.weight", LAYER + "norm.weight": "stack.{i}.norm.weight",
    LAYER + "mixer.in_proj.weight": "stack.{i}.mixer.in_proj.weight",
    LAYER + "mixer.conv1d.weight": "stack.{i}.mixer.conv.weight",
    LAYER + "mixer.conv1d.bias": "stack.{i}.mixer.conv.bias",
    LAYER + "mixer.dt_bias": "stack.{i}.mixer.dt_bias", LAYER + "mixer.A_log": "stack.{i}.mixer.A_log",
    LAYER + "mixer.D": "stack.{i}.mixer.D", LAYER + "mixer.norm.weight": "stack.{i}.mixer.gate_norm.weight",
    LAYER + "mixer.out_proj.weight": "stack.{i}.mixer.out_proj.weight",
}


def make(shape: Shape, weights: Mapping[str, Tensor], *, device: str) -> nn.Module:
    """Their model with our weights, in bf16."""
    if device == "cpu":
        raise RuntimeError("mamba_ssm runs on CUDA only")
    mamba_kernels()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    m = shape.mamba2
    ssm = dict(
        layer="Mamba2", d_state=m.d_state, d_conv=m.d_conv, headdim=m.head_dim, ngroups=m.groups, chunk_size=m.chunk,
        expand=m.heads * m.head_dim // shape.d_model,
    )
    config = MambaConfig(
        d_model=shape.d_model, n_layer=len(shape.pattern), vocab_size=shape.vocab, ssm_cfg=ssm, rms_norm=True,
        residual_in_fp32=True, fused_add_norm=True, tie_embeddings=shape.tied,
    )
    model = MambaLMHeadModel(config, device=device, dtype=torch.bfloat16)
    copy_weights(model, weights, NAMES)
    return model


def build(shape: Shape, weights: Mapping[str, Tensor], *, device: str, **_) -> list[Contender]:
    model = make(shape, weights, device=device).train()

    def loss(tokens_BT: Tensor) -> Tensor:
        logits_BTV = model(tokens_BT).logits[:, :-1]
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())

    return [rival("mamba_ssm", model, loss, model.backbone.embedding.weight)]
