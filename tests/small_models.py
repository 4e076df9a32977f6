"""Small models from text, for tests of what runs: graph("M A F"), made("M A F", dtype="bf16")."""

from __future__ import annotations

import torch

from mambadsl.build.model import Model, build
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.unroll import unroll
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.source import from_text

VOCAB, D_MODEL = 61, 16

LAYERS = """
layer R = mamba1(d_inner=24, d_state=4, d_conv=3, dt_rank=2, chunk=4)
layer Heads = R(heads=3)
layer Giver = R(gives=scan)
layer Memory = gmu(d_inner=24)
layer M = mamba2(heads=4, head_dim=6, d_state=5, groups=2, d_conv=4, chunk=4)
layer A = attention(heads=4, kv_heads=2, head_dim=6, rope=rope(theta=100))
layer L = A(window=3, qk_norm=per_head)
layer F = mlp(d_ff=20, act=relu2)
layer G = mlp(d_ff=12, gated=true)
layer E = moe(experts=4, top_k=2, d_ff=10, shared_d_ff=8, router=sigmoid)
layer Conv = short_conv(d_conv=3, conv_bias=true)
layer Delta = gated_delta_net(heads=4, key_heads=2, key_dim=5, value_dim=6, chunk=4)
layer Kimi = kimi_delta(heads=3, key_dim=5, value_dim=6, decay_rank=4, gate_rank=3, chunk=4)
layer Ling = Kimi(decay=bounded, decay_rank=full, gate_rank=full)
layer Latent = mla(heads=3, nope_dim=5, rope_dim=4, value_dim=6, kv_rank=7)
layer Turned = Latent(q_rank=9, rope=rope(theta=100, pairs=interleaved), out_gate=per_head)
layer Unit = rg_lru(d_inner=12, blocks=3, chunk=4)
layer Fixed = lightning(heads=4, head_dim=6, chunk=4)
layer Exponential = mlstm(heads=3, key_dim=4, value_dim=6, chunk=4)
layer Mean = wkv4(d_inner=12, chunk=4)
layer Channels = channel_mix(d_ff=20)
layer Turning = mamba3(heads=4, head_dim=6, d_state=8, groups=2, chunk=4)
layer Many = Turning(rank=2, gated_norm=before_gate)
layer Lends = A(gives=kv, qk_norm=per_head)
layer Borrows = A(takes=kv, qk_norm=per_head)
layer Near = Borrows(window=3, sinks=true, out_gate=per_head)
layer Sunk = A(sinks=true)
layer Apart = A(differential=halves, window=5)
layer Gated = A(out_gate=elementwise, qk_norm=per_head(zero_centered=true))
layer Squeezed = cca(heads=4, kv_heads=2, head_dim=6, rope=rope(theta=100))
layer Narrow = Squeezed(window=3, d_conv=3, bias=true, residual=affine)
layer First = moe(experts=3, top_k=1, d_ff=10, router=mlp(d_router=8, carry=first), residual=affine)
layer Next = First(router=mlp(d_router=8, carry=next))
layer P = A(residual=post)
layer W = G(residual=sandwich)
layer N = M(residual=normed(alpha=1.5, beta=0.5))
layer Z = A(input=with_embedding)
layer Side = A(input=with_embedding, residual=aside)
layer Proj = linear(norm=none, residual=aside)
layer C = M(recompute=true)
layer H = M(in_multiplier=1.25, out_multiplier=0.3) + A(out_multiplier=0.9)
shared S = A(input=with_embedding)
shared B = [M F]
layer Low = M(adapter=lora(rank=2))
shared Tuned = [A(adapter=lora(rank=3, targets=[qkv_proj], per=segment)) G(adapter=lora(rank=2, targets=[up_proj]))]
shared Aside = [Side G(residual=aside)]
"""

#: Every kind, residual form, a sum, shared layers and blocks, the first embedding carried, layers aside of the stream,
#: adapters.
EVERYTHING = (
    "R M A L F G E P W N Z C H M+A B S R S B Conv Delta Unit Fixed Exponential Mean Channels Turning Many Sunk Apart "
    "Gated Kimi Ling Latent Turned Aside Proj M Heads Aside Z Low Giver Tuned Memory Tuned F+Memory Lends "
    "Borrows M+Near Squeezed First Narrow Next Next"
)
#: The cached kinds.
MIXERS = (
    "R M L G A H S M N S Conv Delta Unit Fixed Exponential Mean Channels Turning Many Sunk Apart "
    "Gated Kimi Ling Latent Turned Aside Proj M Heads Aside M Low Giver Tuned Memory Tuned Lends Borrows M+Near "
    "Squeezed Narrow"
)
#: Of those, what takes something of a layer above, and cannot stand alone.
TAKERS = {"Memory", "Borrows", "M+Near"}


def graph(stack: str, *, more: str = "", **settings: str | int | float) -> LayerGraph:
    """The graph of a stack of the layers above. more: further statements. settings: text of model settings;
    defaults are small."""
    lines = {"vocab": VOCAB, "d_model": D_MODEL, "context": 32, "init_std": 0.3, **settings}
    model = "\n".join(f"  {key} = {value}" for key, value in lines.items())
    text = f"model small {{\n{model}\n}}\n{LAYERS}\n{more}\nstack {{\n  {stack}\n}}\n"
    return unroll(resolve(read(from_text(text, name="small.mdl"))))


def made(stack: str, *, dtype="fp32", seed: int = 0, device="cpu", jitter: bool = True, **settings) -> Model:
    """A built model; with `jitter`, every weight is moved off its initial value, so that ones and zeros
    hide nothing."""
    model = build(graph(stack, **settings), dtype=dtype, seed=seed, device=device).eval()
    return shaken(model) if jitter else model


def shaken(model: Model, *, size: float = 0.1) -> Model:
    from mambadsl.build.init import generator_of

    with torch.no_grad():
        for path, tensor in model.tensors().items():
            noise = torch.randn(tensor.shape, generator=generator_of(path, seed=99))
            # A slope stays positive: a state that grows is no state.
            tensor.add_((size * (noise.abs() if path.endswith(".slope") else noise)).to(tensor))
    return model


def ids(batch: int, length: int, *, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
