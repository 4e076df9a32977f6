"""Costs against counts made by hand, and against what was published."""

from __future__ import annotations

from fractions import Fraction

import pytest

from mambadsl import load
from mambadsl.files import MODELS
from mambadsl.graph.cost import Cost, costs, total
from mambadsl.graph.graph import LayerGraph
from mambadsl.graph.unroll import unroll
from mambadsl.graph.weights import all_weights, node_weights
from mambadsl.spec.resolve import resolve
from mambadsl.syntax.read import read
from mambadsl.text.source import from_text

HEAD = "model m { vocab = 100 d_model = 16 context = 8 } "
A = "attention(heads=4, kv_heads=2, head_dim=4)"
#: qkv 16 x (16 + 8 + 8), out 16 x 16, norm 16.
A_PARAMS = 16 * 32 + 16 * 16 + 16


def graph(text: str) -> LayerGraph:
    return unroll(resolve(read(from_text(HEAD + text))))


def of(text: str, node: str = "stack.0", **how) -> Cost:
    return costs(graph(text), **how)[node]


def whole(text: str) -> Cost:
    return total(costs(graph(text)))


def test_attention():
    cost = of(f"stack {{ {A} }}")
    assert cost.params == cost.used_params == cost.active_params == A_PARAMS and cost.buffers == 0
    assert cost.kv_bytes_per_token == 2 * 2 * 4 * 2 and cost.state_bytes == 0
    # Two products over the mean of 1..8 tokens, 16 channels of queries.
    assert cost.flops.forward == 2 * (16 * 32 + 16 * 16) + 4 * 16 * Fraction(9, 2)
    assert cost.flops.backward_weight == 2 * (16 * 32 + 16 * 16)


def test_a_window_is_state_of_a_fixed_size():
    cost = of(f"layer A = {A} stack {{ A(window=3) }}")
    assert cost.kv_bytes_per_token == 0 and cost.state_bytes == 3 * 2 * 2 * 4 * 2
    # Tokens see 1, 2, 3, 3, 3, 3, 3, 3 tokens.
    assert cost.flops.forward - of(f"stack {{ {A} }}").flops.forward == 4 * 16 * (
        Fraction(21, 8) - Fraction(9, 2)
    )
    assert of(f"layer A = {A} stack {{ A(window=8) }}").flops == of(f"stack {{ {A} }}").flops


def test_length_matters_where_tokens_look_at_tokens():
    assert of("stack { mlp(d_ff=32) }", length=4).flops == of("stack { mlp(d_ff=32) }", length=999).flops
    assert of(f"stack {{ {A} }}", length=4).flops.forward < of(f"stack {{ {A} }}", length=16).flops.forward


def test_mamba2():
    """d_inner 4 * 8 = 32; in_proj [z 32 | x 32 | B 16 | C 16 | dt 4]; 64 channels of conv, 4 taps."""
    cost = of("stack { mamba2(heads=4, head_dim=8, d_state=16) }")
    assert cost.params == 16 + 16 * 100 + 64 * 4 + 64 + 3 * 4 + 32 + 32 * 16
    assert cost.state_bytes == 64 * 3 * 2 + 4 * 8 * 16 * 4 and cost.kv_bytes_per_token == 0


def test_mlp_and_moe():
    assert of("stack { mlp(d_ff=32) }").params == 16 + 2 * 16 * 32
    assert of("stack { mlp(d_ff=32, gated=true, bias=true) }").params == 16 + 3 * 16 * 32 + 2 * 32 + 16
    moe = of("stack { moe(experts=4, top_k=1, d_ff=32, router=sigmoid, shared_d_ff=8) }")
    expert = 2 * 16 * 32
    assert moe.params == 16 + 4 * 16 + 4 * expert + 2 * 16 * 8
    assert moe.active_params == moe.params - 3 * expert
    assert moe.buffers == 4  # the selection bias
    assert moe.flops.forward == 2 * (4 * 16 + expert + 2 * 16 * 8)


def test_norms_and_sums():
    assert of(f"stack {{ {A[:-1]}, norm=none) }}").params == A_PARAMS - 16
    assert of(f"stack {{ {A[:-1]}, norm=layernorm) }}").params == A_PARAMS + 16
    assert of(f"stack {{ {A[:-1]}, residual=sandwich) }}").params == A_PARAMS + 16
    assert of(f"stack {{ {A[:-1]}, input=with_embedding) }}").params == 32 * 32 + 16 * 16 + 32
    both = of(f"stack {{ {A}+mlp(d_ff=32) }}")
    assert both.params == A_PARAMS + 2 * 16 * 32  # one norm
    assert both.kv_bytes_per_token == of(f"stack {{ {A} }}").kv_bytes_per_token


def test_embedding_and_head():
    parts = costs(graph("stack { mlp(d_ff=32) }"))
    assert parts["embed"].params == 1600 and parts["embed"].flops.forward == 0
    assert parts["head"].params == 1600 + 16 and parts["head"].flops.forward == 2 * 1600
    tied = costs(
        unroll(
            resolve(read(from_text("model m { vocab = 100 d_model = 16 tie_embeddings = true } stack { F }")))
        )
    )
    assert tied["head"].params == 16 and tied["head"].used_params == 1616


def test_shared_weights_count_once_and_their_state_each_time():
    cost = whole(f"shared S = {A} stack {{ S*3 }}")
    assert cost.params == 1600 * 2 + 16 + A_PARAMS
    assert cost.used_params == 1600 * 2 + 16 + 3 * A_PARAMS
    assert cost.kv_bytes_per_token == 3 * 32
    by_path = costs(graph(f"shared S = {A} stack {{ S*3 }}"))
    assert [by_path[f"stack.{i}"].params for i in range(3)] == [A_PARAMS, 0, 0]


def test_shared_layers_and_the_same_layer_not_shared():
    """The same recipe may stand in the stack with weights of its own, and in something shared."""
    text = f"layer A = {A} shared S = A stack {{ A S A S A }}"
    assert whole(text).params == 3216 + 4 * A_PARAMS
    text = f"layer A = {A} stack {{ A }} mtp(depths=3, weights=shared) {{ A }}"
    join = 2 * 16 + 16 * 32 + 16
    assert whole(text).params == 3216 + 2 * A_PARAMS + join
    assert whole(text.replace("=shared", "=own")).params == 3216 + 4 * A_PARAMS + 3 * join


def test_adapters_are_each_use_s_own():
    text = f"shared S = {A} stack {{ S S(adapter=lora(rank=2, targets=[o_proj])) S(adapter=lora(rank=3)) }}"
    by_path = costs(graph(text))
    assert [by_path[f"stack.{i}"].params for i in range(3)] == [
        A_PARAMS,
        2 * (16 + 16),
        3 * (16 + 32) + 3 * (16 + 16),
    ]


def test_adapters_work_and_are_kept_for_the_backward_pass():
    plain, whole, parts = (of(f"stack {{ {A[:-1]}, adapter={text}) }}") for text in (
        "none", "lora(rank=2, targets=[qkv_proj])", "lora(rank=2, targets=[qkv_proj], per=segment)",
    ))
    assert whole.params - plain.params == 2 * (16 + 32) and parts.params - plain.params == 2 * (3 * 16 + 32)
    for cost, rows in (whole, 2), (parts, 6):
        assert cost.flops.forward - plain.flops.forward == 2 * (cost.params - plain.params)
        assert cost.saved_bytes_per_token - plain.saved_bytes_per_token == rows * 2


@pytest.mark.parametrize(
    "text",
    [
        "shared S = [A F] stack { S M S(adapter=lora(rank=2)) } mtp(depths=2, weights=shared) { S A }",
        "stack { E*3 M+A } mtp { E }",
        "model m { tie_embeddings = true } stack { M A(window=3) F }",
    ],
)
def test_costs_and_the_table_of_weights_agree(text):
    g = unroll(resolve(read(from_text(text))))
    weights = all_weights(g)
    cost = total(costs(g))
    assert cost.params == sum(w.elements for w in weights.values() if w.trained)
    assert cost.buffers == sum(w.elements for w in weights.values() if not w.trained)
    assert cost.active_params == sum(w.elements * w.active for w in weights.values() if w.trained)


def test_nemotron_h_8b():
    cost = load(MODELS / "nemotron_h_8b.mdl").cost()
    assert cost.params == 8_100_852_736
    # 4 attention layers, 8 heads of 128 for keys and values, 2 bytes each.
    assert cost.kv_bytes_per_token == 4 * 2 * 8 * 128 * 2 == 16_384
    # 24 layers: 128 x 64 x 128 numbers in fp32, and 3 inputs of 10,240 channels in bf16.
    assert cost.state_bytes == 24 * (128 * 64 * 128 * 4 + 3 * 10_240 * 2) == 102_137_856


def test_nemotron_3_nano():
    assert load(MODELS / "nemotron_3_nano_30b_a3b.mdl").cost().active_params == 3_580_073_408


def test_ten_thousand_layers_are_counted_at_once():
    import time

    g = graph("shared S = [A F] stack { [M F]*2500 S*2500 }")
    start = time.thread_time()
    cost = total(costs(g))
    assert time.thread_time() - start < 2
    assert cost.params == whole("shared S = [A F] stack { [M F] S }").params + 2499 * (
        of("stack { M }").params + of("stack { F }").params
    )


def test_paths_of_weights():
    g = graph(
        "shared S = [A F] stack { M S M+A S(adapter=lora(rank=2, targets=[up_proj])) }"
        "mtp(weights=shared) { F }"
    )
    paths = all_weights(g)
    for path in (
        "embed.weight",
        "stack.0.norm.weight",
        "stack.0.mixer.in_proj.weight",
        "stack.0.mixer.A_log",
        "shared.S.0.norm.weight",
        "shared.S.0.mixer.qkv_proj.weight",
        "shared.S.1.mixer.down_proj.weight",
        "stack.3.norm.weight",
        "stack.3.0.in_proj.weight",
        "stack.3.1.qkv_proj.weight",
        "mtp.0.eh_proj.weight",
        "mtp.0.enorm.weight",
        "mtp.0.hnorm.weight",
        "mtp.0.0.mixer.down_proj.weight",
        "mtp.0.final_norm.weight",
        "final_norm.weight",
        "head.weight",
    ):
        assert path in paths, path
    assert paths["stack.5.mixer.adapter.gate_up_proj.down.weight"].shape[0] == 2
    assert not any(path.startswith(("stack.1.", "stack.2.", "stack.4.")) for path in paths)
    assert [p for p, _ in node_weights(g, g.by_path["embed"])] == ["embed.weight"]


def test_tied_heads_read_the_embedding():
    g = unroll(resolve(read(from_text("model m { tie_embeddings = true } stack { F }"))))
    assert [p for p, _ in node_weights(g, g.by_path["head"])] == ["final_norm.weight", "embed.weight"]
    assert "head.weight" not in all_weights(g)


def test_a_length_is_at_least_one_token():
    program = load(text="M")
    for length in (0, -1):
        with pytest.raises(ValueError, match="length"):
            program.cost(length=length)
