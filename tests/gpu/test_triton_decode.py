"""The decoding kernels on a GPU: steps give what the module gives for the row; a graph of steps gives it again."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
if torch.cuda.is_available():
    from decode_cases import CASES, difference, past_and_future, sublayer

    from mambadsl.parts.triton.decode import head, steps
else:
    CASES = {}

PATHS = ("matvec", "skinny", "cublas", "cublas_rounded")
#: More rows than `configs.MOST_CONVOLVED_INSIDE` for the library's ways.
MANY = (5, 0, 17, 2, 30, 9, 1, 4, 11, 3)
LENGTHS = {"matvec": MANY[:3], "skinny": MANY[:6], "cublas": MANY, "cublas_rounded": MANY}


def follow(made, path, *, dtype=None, count=3, slots=64):
    x_BTD, expected_BTD, state = past_and_future(
        made, lengths=LENGTHS[path], steps=count, slots=slots, stream=torch.float32, ssm=dtype or torch.float32
    )
    position_B = torch.tensor(LENGTHS[path], device="cuda")
    step = steps.STEPS[made.mixer.kind.name]
    got = [step(made, x_BTD[:, t].clone(), position_B + t, state, path=path) for t in range(count)]
    return difference(torch.stack(got, 1), expected_BTD)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_steps_are_the_module(name, path):
    made = sublayer(CASES[name], device="cuda")
    if (path, name) == ("matvec", "mamba2: odd norm groups"):
        with pytest.raises(ValueError, match="a power of two is needed"):
            follow(made, path)
    else:
        assert follow(made, path) < 2e-5


@pytest.mark.parametrize("ssm", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", [
    "mamba2(heads=64, head_dim=64, d_state=128)",
    "mamba2(heads=128, head_dim=64, d_state=128, groups=8, norm_groups=8)",
    "mamba2(heads=24, head_dim=128, d_state=256, gated_norm=before_gate)",
    "attention(heads=16, kv_heads=8, head_dim=128, rope=rope(theta=10000))",
    "attention(heads=32, kv_heads=2, head_dim=80, window=16)",
    "attention(heads=8, kv_heads=8, head_dim=256)",
    "mlp(d_ff=8192, act=relu2)",
    "mlp(d_ff=5632, gated=true)",
])
@pytest.mark.parametrize("path", PATHS)
def test_published_sizes_in_bf16(text, path, ssm):
    if ssm == torch.bfloat16 and not text.startswith("mamba2"):
        pytest.skip("no such state")
    made = sublayer(text, d_model=2048, dtype=torch.bfloat16, device="cuda")
    assert follow(made, path, dtype=ssm) < 2e-2


def test_window_in_a_ring():
    made = sublayer(CASES["attention: window"], device="cuda")
    for slots in (4, 5, 7, 64):
        assert follow(made, "skinny", slots=slots, count=7) < 2e-5


@pytest.mark.parametrize("path", PATHS)
def test_one_graph_for_all_steps(path):
    """Captured once, replayed for token after token: states, lengths and positions live on the device."""
    names = "mamba2: plain", "mlp: gelu", "attention: grouped", "mlp: gated", "attention: window", "mamba2: no norm"
    made = [sublayer(CASES[name], device="cuda", seed=i) for i, name in enumerate(names)]
    batch, count = (2 if path == "matvec" else 10), 40
    x_TBD = torch.randn(count, batch, 24, device="cuda")

    def fresh():
        states = [past_and_future(m, lengths=(0,) * batch, steps=1, slots=64)[2] for m in made]
        for state in states:
            for name in ("k", "v"):
                if name in state:
                    state[name].zero_()
        return states, torch.zeros(batch, dtype=torch.int64, device="cuda")

    def one(x_BD, states, position_B):
        for m, state in zip(made, states):
            x_BD = steps.STEPS[m.mixer.kind.name](m, x_BD, position_B, state, path=path)
        return x_BD

    states, position_B = fresh()
    expected = []
    for x_BD in x_TBD:
        expected.append(one(x_BD.clone(), states, position_B))
        torch.cuda.synchronize()
        position_B += 1
    states, position_B = fresh()
    # Clones: what runs before the capture must leave no trace.
    stream_BD = x_TBD[0].clone()
    kept = [{name: t.clone() for name, t in state.items()} for state in states]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_BD = one(stream_BD, states, position_B)
        position_B += 1
    for state, before in zip(states, kept):
        for name, t in state.items():
            assert torch.equal(t, before[name])
    for t, x_BD in enumerate(x_TBD):
        stream_BD.copy_(x_BD)
        graph.replay()
        assert difference(y_BD, expected[t]) < 1e-5
    assert states[names.index("attention: grouped")]["used"].tolist() == [count] * batch


def test_logits_of_a_large_vocabulary():
    made = sublayer("mlp(d_ff=64)", d_model=2048, dtype=torch.bfloat16, device="cuda")
    weight_VD = torch.randn(50288, 2048, device="cuda").bfloat16()
    for batch, path in ((1, "matvec"), (4, "matvec"), (9, "skinny"), (64, "cublas")):
        x_BD = torch.randn(batch, 2048, device="cuda")
        logits_BV = head.logits(made.norm, x_BD, weight_VD, path=path)
        assert difference(logits_BV, made.norm(x_BD) @ weight_VD.float().T) < 1e-2
        assert torch.equal(head.most_likely(logits_BV), logits_BV.argmax(-1))
