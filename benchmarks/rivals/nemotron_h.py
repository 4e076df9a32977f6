"""Hugging Face's NemotronH: eager, bf16, scaled_dot_product_attention, mamba-ssm's kernels where they load."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rivals.contender import Contender, Shape, Source, copy_weights, mamba_kernels, rival

MIXER = {
    "in_proj.weight": "in_proj.weight", "conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias",
    "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm.weight": "gate_norm.weight",
    "out_proj.weight": "out_proj.weight", "up_proj.weight": "up_proj.weight",
    "down_proj.weight": "down_proj.weight", "o_proj.weight": "o_proj.weight",
}


def names(shape: Shape, base: str) -> dict[str, str | Source]:
    """base: what the inner model is called (`model` or `backbone`, by version)."""
    found: dict[str, str | Source] = {
        f"{base}.embeddings.weight": "embed.weight", f"{base}.norm_f.weight": "final_norm.weight",
        "lm_head.weight": "head.weight", f"{base}.layers.{{i}}.norm.weight": "stack.{i}.norm.weight",
    }
    for theirs, ours in MIXER.items():
        found[f"{base}.layers.{{i}}.mixer.{theirs}"] = f"stack.{{i}}.mixer.{ours}"
    if f := shape.attention:
        # Ours is [q | k | v].
        sizes = [f.heads * f.head_dim, f.kv_heads * f.head_dim, f.kv_heads * f.head_dim]
        for j, name in enumerate("qkv"):
            def cut(t: Tensor, j: int = j) -> Tensor:
                return t.split(sizes)[j]

            source = Source("stack.{i}.mixer.qkv_proj.weight", cut)
            found[f"{base}.layers.{{i}}.mixer.{name}_proj.weight"] = source
    return found


def build(
    shape: Shape, weights: Mapping[str, Tensor], *, device: str, dtype: torch.dtype = torch.bfloat16, **_
) -> list[Contender]:
    if device != "cpu":
        mamba_kernels()
    from transformers import NemotronHConfig, NemotronHForCausalLM

    m, a, f = shape.mamba2, shape.attention, shape.mlp
    config = NemotronHConfig(
        vocab_size=shape.vocab, hidden_size=shape.d_model, hybrid_override_pattern=shape.pattern,
        tie_word_embeddings=shape.tied, layer_norm_epsilon=shape.eps, use_cache=False,
        num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=a.head_dim,
        intermediate_size=f.d_ff, mlp_hidden_act="relu2", ssm_state_size=m.d_state, mamba_num_heads=m.heads,
        mamba_head_dim=m.head_dim, n_groups=m.groups, conv_kernel=m.d_conv, chunk_size=m.chunk,
    )
    with torch.device(device):
        model = NemotronHForCausalLM(config)
    model = model.to(device=device, dtype=dtype).train()
    for module in model.modules():
        # They clamp dt from below (at 0.001, in some versions); the model here has no limit.
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    base = next(name for name, _ in model.named_parameters() if name.endswith(".embeddings.weight")).split(".")[0]
    copy_weights(model, weights, names(shape, base))

    def loss(tokens_BT: Tensor) -> Tensor:
        return model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss

    return [rival("transformers", model, loss, model.get_input_embeddings().weight)]
