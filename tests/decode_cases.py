"""Sublayers of many forms for the fused decoding steps, and what a step must give: what the module gives for a row.

    made = sublayer("mamba2(heads=4)", d_model=32)
    expected, state = past_and_future(made, lengths=(0, 5), steps=3, slots=16)
"""

from __future__ import annotations

import torch
from small_models import graph
from torch import Tensor

from mambadsl.build.sublayer import Sublayer
from mambadsl.graph.graph import Role
from mambadsl.kinds.tokens import Tokens

#: As small as they can be with every feature: Triton's interpreter takes milliseconds for each of a step's programs.
MAMBA2 = {
    "plain": "mamba2(heads=2, head_dim=8, d_state=16)",
    "groups": "mamba2(heads=4, head_dim=4, d_state=8, groups=2, norm_groups=4, bias=true)",
    "no conv bias": "mamba2(heads=2, head_dim=4, d_state=4, d_conv=3, conv_bias=false, dt_limit=[0.3, 0.9])",
    "gate after norm": "mamba2(heads=4, head_dim=8, d_state=8, groups=2, gated_norm=before_gate, d_conv=2)",
    "no norm": "mamba2(heads=1, head_dim=32, d_state=8, gated_norm=none)",
    "odd norm groups": "mamba2(heads=3, head_dim=4, d_state=8, groups=1, norm_groups=2)",
    "multipliers": "mamba2(heads=2, head_dim=8, d_state=8, proj_multipliers=[0.5, 1.5, 0.7, 1.3, 2], "
    "in_multiplier=1.25, out_multiplier=0.3, bias=true)",
    "centered norm": "mamba2(heads=1, head_dim=8, d_state=8, norm=rmsnorm(zero_centered=true))",
    "no norm before": "mamba2(heads=1, head_dim=8, d_state=8, norm=none)",
}
ATTENTION = {
    "grouped": "attention(heads=4, kv_heads=2, head_dim=8, rope=rope(theta=100))",
    "each its own": "attention(heads=3, kv_heads=3, head_dim=10, qkv_bias=true, o_bias=true, scale=0.5)",
    "one pair": "attention(heads=6, kv_heads=1, head_dim=12, rope=rope(theta=100, fraction=0.5))",
    "window": "attention(heads=2, kv_heads=1, head_dim=8, window=5, rope=rope(theta=100))",
    "softcap": "attention(heads=2, kv_heads=1, head_dim=8, softcap=1.5, key_multiplier=1.7, out_multiplier=0.5)",
    "qk norm": "attention(heads=2, kv_heads=1, head_dim=8, qk_norm=per_head, rope=rope(theta=100))",
    "yarn": "attention(heads=1, kv_heads=1, head_dim=16, "
    "rope=rope(theta=100, scaling=yarn(factor=4, original_context=8)))",
    "llama3": "attention(heads=1, kv_heads=1, head_dim=16, "
    "rope=rope(theta=100, scaling=llama3(factor=4, original_context=8)))",
}
MLP = {
    "silu": "mlp(d_ff=48, act=silu)",
    "relu2": "mlp(d_ff=40, act=relu2, bias=true, out_multiplier=0.5)",
    "relu": "mlp(d_ff=24, act=relu)",
    "gelu": "mlp(d_ff=24, act=gelu)",
    "gelu_tanh": "mlp(d_ff=24, act=gelu_tanh, in_multiplier=1.5)",
    "gated": "mlp(d_ff=20, gated=true, bias=true, gate_multiplier=1.3)",
    "gated gelu": "mlp(d_ff=33, act=gelu_tanh, gated=true)",
}
CASES = {
    f"{kind}: {name}": text
    for kind, texts in (("mamba2", MAMBA2), ("attention", ATTENTION), ("mlp", MLP)) for name, text in texts.items()
}


def sublayer(
    text: str, *, d_model: int = 24, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Sublayer:
    """One layer with random weights, none of them trivial."""
    layers = graph("Y", more=f"layer Y = {text}", d_model=d_model)
    node = next(node for node in layers.nodes if node.role is Role.LAYER)
    made = Sublayer(node, d_model=d_model, dtype=dtype, device=device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in made.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        scale = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.3
        tensor.copy_(noise * scale + (1.0 if "norm" in name or name.endswith(".D") else 0.0))
    return made


def past_and_future(
    made: Sublayer, *, lengths: tuple[int, ...], steps: int, slots: int, seed: int = 1,
    stream: torch.dtype | None = None, ssm: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows that have `lengths` tokens behind them and `steps` before them: the steps' inputs x_BTD, what the module
    makes of them in one go y_BTD, and the fixed state that a step starts from. slots: of the attention cache."""
    mixer, device = made.mixer, next(made.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    stream = stream or mixer.dtype
    futures, expected, states = [], [], []
    for length in lengths:
        x = torch.randn(1, length + steps, mixer.dims.d_model, generator=generator).to(device, stream)
        expected.append(made(x, None, Tokens.plain(1, length + steps, device=device))[:, length:])
        state = mixer.init_state(1, dtype=mixer.dtype, device=device)
        if length:
            made(x[:, :length], None, Tokens.plain(1, length, device=device), [state])
        futures.append(x[:, length:])
        states.append(state)
    fixed = {}
    if "ssm" in states[0]:
        fixed = {name: torch.cat([s[name] for s in states]) for name in ("conv", "ssm")}
        fixed["ssm"] = fixed["ssm"].to(ssm)
    elif "k" in states[0]:
        fixed = {name: _ring([s[name][0] for s in states], lengths, slots) for name in ("k", "v")}
        fixed["used"] = torch.tensor(lengths, device=device)
    return torch.cat(futures), torch.cat(expected), {name: t.contiguous() for name, t in fixed.items()}


def state_after(
    made: Sublayer, *, lengths: tuple[int, ...], steps: int, slots: int, seed: int = 1
) -> dict[str, Tensor]:
    """The state that those steps must leave: of the same tokens, all of them behind the rows."""
    later = tuple(length + steps for length in lengths)
    return past_and_future(made, lengths=later, steps=0, slots=slots, seed=seed)[2]


def _ring(rows: list[Tensor], lengths: tuple[int, ...], slots: int) -> Tensor:
    """The last tokens of each row, token t in slot t % slots; what no token has written is not finite."""
    ring = rows[0].new_full((len(rows), slots, *rows[0].shape[1:]), float("nan"))
    for b, (kept, length) in enumerate(zip(rows, lengths)):
        for i, entry in enumerate(kept):
            ring[b, (length - len(kept) + i) % slots] = entry
    return ring


def difference(a: Tensor, b: Tensor) -> float:
    """Largest error relative to the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())
