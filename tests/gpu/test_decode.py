"""The decoding engine on an NVIDIA GPU: one CUDA graph a step writes what eager steps and the CPU do."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from small_models import MIXERS, graph, ids, made, shaken

from mambadsl.build.model import build
from mambadsl.run.decode import Decoder
from mambadsl.run.generate import generate, has_decoder
from mambadsl.text.diagnostic import MdlError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

#: Sizes that the kernels take.
LAYERS = """
layer X = mamba2(heads=8, head_dim=16, d_state=32, groups=2, d_conv=4, chunk=32)
layer Y = attention(heads=4, kv_heads=2, head_dim=16, rope=rope(theta=100))
layer V = Y(window=5, qk_norm=per_head)
layer U = mlp(d_ff=96, act=relu2)
layer T = mlp(d_ff=64, gated=true)
"""
STACKS = {"mamba": "X X X", "hybrid": "X U Y X T V X U"}
DRAWN = dict(temperature=0.8, top_k=20, top_p=0.95)
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [3, 3], [60], [4] * 6, [1, 2], [2, 1]]
COUNT = 40


def fitted(stack: str, *, parts: str, dtype: str = "fp32"):
    text = graph(STACKS[stack], more=LAYERS, d_model=64, context=128, tie_embeddings="true")
    try:
        return shaken(build(text, parts=parts, dtype=dtype, device="cuda").eval())
    except MdlError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


def decoder(model, batch: int, **how) -> Decoder:
    return Decoder(model, batch=batch, capacity=64, **how)


def tokens_of(one: Decoder, prompts, *, count: int = COUNT, seed: int = 1, stop=()):
    one.prefill(prompts, seed=seed)
    return one.run(count, stop=stop)


@pytest.mark.parametrize("how", [{}, DRAWN, dict(temperature=1.0)], ids=["greedy", "top_k, top_p", "all"])
def test_the_reference_in_a_graph_is_the_cpu(how):
    cpu, gpu = made(MIXERS), made(MIXERS, device="cuda")
    with decoder(gpu, 4, graph=True, **how) as one:
        for prompts in PROMPTS[:4], PROMPTS[4:]:
            assert tokens_of(one, prompts, count=16) == generate(cpu, prompts, max_tokens=16, seed=1, **how)
        assert one.captures == 1


@pytest.mark.parametrize("chunk", [1, 3, 2048])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("stack", STACKS)
def test_a_graph_is_the_eager_steps(stack, batch, chunk):
    model = fitted(stack, parts="inference")
    how = dict(prefill_chunk=chunk)
    with decoder(model, batch, graph=True, **how) as fast, decoder(model, batch, graph=False, **how) as slow:
        for prompts in PROMPTS[:batch], PROMPTS[-batch:]:
            assert tokens_of(fast, prompts) == tokens_of(slow, prompts)
        assert (fast.captures, slow.captures) == (1, 0)


@pytest.mark.parametrize("stack", STACKS)
def test_draws_in_a_graph_are_the_eager_ones(stack):
    model = fitted(stack, parts="inference")
    with decoder(model, 3, graph=True, **DRAWN) as fast, decoder(model, 3, graph=False, **DRAWN) as slow:
        for seed in 1, 2:
            assert tokens_of(fast, PROMPTS[:3], seed=seed) == tokens_of(slow, PROMPTS[:3], seed=seed)


@pytest.mark.parametrize(("dtype", "near"), [("fp32", 5e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("stack", STACKS)
def test_fused_steps_are_the_reference(stack, batch, dtype, near):
    model, truth = fitted(stack, parts="inference", dtype=dtype), fitted(stack, parts="reference")
    truth.load_state_dict(model.state_dict())
    tokens = ids(batch, 30).cuda()
    state = model.init_state(batch, capacity=30)
    with torch.no_grad():
        wanted = truth(tokens)[:, 10:]
        model(tokens[:, :10], state=state)
        found = torch.cat([model(tokens[:, t : t + 1], state=state) for t in range(10, 30)], 1)
    assert (found - wanted).norm() < near * wanted.norm()
    assert all(layer.has_step for _, layer in model.sublayers())


def test_decoders_live_side_by_side():
    model = fitted("hybrid", parts="inference")
    with decoder(model, 2) as two, decoder(model, 8) as eight:
        wanted = [tokens_of(two, PROMPTS[:2]), tokens_of(eight, PROMPTS)]
        two.prefill(PROMPTS[:2])
        eight.prefill(PROMPTS)
        found = [[[] for _ in row] for row in wanted]
        lines = [two.steps(COUNT), eight.steps(COUNT)]
        for _ in range(2 * COUNT):
            # Half a token of all rows at a time: the graphs' replays alternate.
            for decoded, steps in zip(found, lines):
                for step in islice(steps, len(decoded) // 2):
                    decoded[step.row].append(step.token)
        assert found == [[list(one.tokens) for one in rows] for rows in wanted]


def test_generate_goes_through_a_decoder():
    model = fitted("hybrid", parts="inference")
    assert has_decoder(model) and not has_decoder(fitted("hybrid", parts="reference"))
    with decoder(model, 8, graph=False) as slow:
        free = tokens_of(slow, PROMPTS)
        assert generate(model, PROMPTS, max_tokens=COUNT) == free
        stop = [free[2].tokens[3:5], free[0].tokens[20]]
        assert generate(model, PROMPTS, max_tokens=COUNT, stop=stop) == tokens_of(slow, PROMPTS, stop=stop)


def test_states_in_bf16_and_memory_given_back():
    model = fitted("hybrid", parts="inference", dtype="bf16")
    with decoder(model, 8, state_dtype=torch.bfloat16) as one:
        assert one.state.layers["stack.0"]["ssm"].dtype == torch.bfloat16
        assert len(tokens_of(one, PROMPTS)[0].tokens) == COUNT
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        with Decoder(model, batch=8, capacity=2**17) as large:
            tokens_of(large, PROMPTS)
            held = torch.cuda.memory_allocated() - before
    assert held > 2**27 and torch.cuda.memory_allocated() - before < 2**26


def test_layers_that_wait_are_run_eagerly():
    model = made("M E A", device="cuda")
    with decoder(model, 2) as one:
        assert one.graph is None
        assert tokens_of(one, PROMPTS[:2], count=8) == generate(made("M E A"), PROMPTS[:2], max_tokens=8)
    with pytest.raises(ValueError, match="waits for the device"):
        decoder(model, 2, graph=True)
