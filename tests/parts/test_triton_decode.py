"""The decoding kernels in Triton's interpreter: each step gives, token by token, what the module gives for the row."""

from __future__ import annotations

import interpreter
import pytest
import torch
from decode_cases import CASES, difference, past_and_future, state_after, sublayer

from mambadsl.kinds.norm import rms_norm
from mambadsl.parts.triton.decode import configs, head, linear, steps
from mambadsl.parts.triton.decode.attention import attend
from mambadsl.parts.triton.decode.embed import make_embed
from mambadsl.parts.triton.decode.norm import RowNorm

pytestmark = interpreter.ONLY

PATHS = ("matvec", "skinny", "cublas")


def follow(made, *, path, lengths, slots, steps_taken=1, **how):
    """Largest difference of a few steps from the module; the state after them is the module's, too."""
    x_BTD, expected_BTD, state = past_and_future(made, lengths=lengths, steps=steps_taken, slots=slots, **how)
    position_B = torch.tensor(lengths)
    got = []
    for t in range(steps_taken):
        x_BD = x_BTD[:, t].clone()
        y_BD = steps.STEPS[made.mixer.kind.name](made, x_BD, position_B + t, state, path=path)
        assert y_BD.data_ptr() == x_BD.data_ptr()
        got.append(y_BD)
    same_state(state, state_after(made, lengths=lengths, steps=steps_taken, slots=slots))
    return difference(torch.stack(got, 1), expected_BTD)


def same_state(state, wanted):
    assert state.keys() == wanted.keys()
    for name, t in wanted.items():
        # A ring's other slots hold tokens that no query sees any more, or none yet.
        kept = t.isfinite()
        assert torch.allclose(state[name][kept], t[kept], rtol=1e-4, atol=1e-5), name


#: Forms that differ in what the projections around the mixer do.
FEW = ("mamba2: gate after norm", "mamba2: multipliers", "attention: each its own", "mlp: relu2", "mlp: gated")
#: Attention's own forms lie between the projections, whose way makes no difference to them.
FORMS = [name for name in CASES if not name.startswith("attention") or name in FEW]


@pytest.mark.parametrize("path, lengths, name", [
    *(("matvec", (0, 9), name) for name in CASES), *(("matvec", (4,), name) for name in FEW),
    *(("skinny", (7, 1, 12), name) for name in FORMS), *(("cublas", (3, 0), name) for name in FEW),
])
def test_steps_are_the_module(path, lengths, name):
    # Widths of norm groups that one way leaves to another.
    path = None if "odd" in name and path == "matvec" else path
    assert follow(sublayer(CASES[name]), path=path, lengths=lengths, slots=20) < 1e-5


@pytest.mark.parametrize("path", PATHS[:2])
def test_one_step_after_another(path):
    assert follow(sublayer(CASES["mamba2: groups"]), path=path, lengths=(2, 0), slots=1, steps_taken=2) < 1e-5


@pytest.mark.parametrize("name, channels_innermost", [
    ("no conv bias", False), ("groups", True), ("gate after norm", False), ("multipliers", True),
])
def test_convolution_of_its_own(name, channels_innermost, monkeypatch):
    """As large batches have it; and any strides of its state."""
    monkeypatch.setattr(steps, "MOST_CONVOLVED_INSIDE", 0)
    made = sublayer(CASES[f"mamba2: {name}"])
    x_BTD, expected_BTD, state = past_and_future(made, lengths=(0, 3), steps=2, slots=1)
    if channels_innermost:
        state["conv"] = state["conv"].mT.contiguous().mT
    got = [
        steps.mamba2(made, x_BTD[:, t].clone(), torch.zeros(2), state, path=("cublas", "cublas_rounded"))
        for t in range(2)
    ]
    assert difference(torch.stack(got, 1), expected_BTD) < 1e-5
    same_state(state, state_after(made, lengths=(0, 3), steps=2, slots=1))


@pytest.mark.parametrize("slots", [4, 7, 64])
def test_window_in_a_ring(slots):
    """Before and after the ring is full, and across both its end and the window's."""
    made = sublayer(CASES["attention: window"])
    assert follow(made, path="cublas", lengths=(3, 11), slots=slots, steps_taken=3) < 1e-5


@pytest.mark.parametrize("name, splits", [("grouped", 8), ("window", 3), ("softcap", 1), ("each its own", 3)])
def test_splits_of_keys(name, splits, monkeypatch):
    """Splits of many blocks and of none; rows of no key but the new one."""
    monkeypatch.setattr(steps, "attend", lambda *args, **how: attend(*args, splits=splits, **how))
    assert follow(sublayer(CASES[f"attention: {name}"]), path="cublas", lengths=(0, 70), slots=128) < 1e-5


def test_stream_of_another_dtype():
    """A float32 stream around narrower weights: sums are not rounded to the weights' dtype on the way."""
    made = sublayer(CASES["mlp: silu"], dtype=torch.float16)
    x_BTD, expected_BTD, state = past_and_future(made, lengths=(0,), steps=1, slots=1, stream=torch.float32)
    y_BD = steps.mlp(made, x_BTD[:, 0].clone(), torch.zeros(1, dtype=torch.int64), state, path="matvec")
    assert y_BD.dtype == torch.float32
    assert difference(y_BD, expected_BTD[:, 0]) < 2e-3


@pytest.mark.parametrize("path, tile, width", [
    ("matvec", configs.Block(128, 16), 48), ("matvec", configs.Block(512, 64), 100),
    ("matvec", configs.Block(2**15, 4096), 100), ("skinny", configs.Tile(16, 32, split=2), 100),
    ("skinny", configs.Tile(16, 16), 48),
])
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_of_a_product(path, tile, width, gated):
    generator = torch.Generator().manual_seed(0)
    x_BK, weight_NK, scale_K = (torch.randn(*n, generator=generator) for n in ((3, width), (22, width), (width,)))
    y_BN = linear.norm_linear(
        x_BK, weight_NK, norm=RowNorm(scale_K, 1e-5), path=path, tile=tile, after=linear.After(gated=gated)
    )
    wanted_BN = rms_norm(x_BK, scale_K, eps=1e-5) @ weight_NK.T
    if gated:
        gate_BF, up_BF = wanted_BN.chunk(2, 1)
        wanted_BN = gate_BF * up_BF
    assert difference(y_BN, wanted_BN) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_logits(path):
    made = sublayer(CASES["mlp: silu"])
    weight_VD = torch.randn(75, 24, generator=torch.Generator().manual_seed(0))
    x_BD = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    logits_BV = head.logits(made.norm, x_BD, weight_VD, scale=0.5, path=path)
    assert difference(logits_BV, made.norm(x_BD) @ weight_VD.T * 0.5) < 1e-5


def test_the_most_likely(vocab=2500):
    logits_BV = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.most_likely(logits_BV), logits_BV.argmax(-1))
    ties = torch.zeros(1, vocab)
    ties[0, [1030, 2400]] = 1
    assert head.most_likely(ties).tolist() == [1030]
    ties[0, 2450:] = float("nan")
    assert head.most_likely(ties).tolist() == ties.argmax(-1).tolist() == [2450]
    assert head.most_likely(torch.full((1, vocab), float("nan"))).tolist() == [0]


def test_the_next_token_is_written_where_steps_and_the_host_read_it():
    token_B, history_TB, written_1 = torch.zeros(3).long(), torch.full((4, 3), -1), torch.tensor([1])
    rows = torch.randn(2, 3, 1100, generator=torch.Generator().manual_seed(0))
    for logits_BV in rows:
        head.next_token(logits_BV, token_B, history_TB, written_1)
    wanted = rows.argmax(-1)
    assert written_1.tolist() == [3] and torch.equal(token_B, wanted[1])
    assert torch.equal(history_TB, torch.cat((torch.full((1, 3), -1), wanted, torch.full((1, 3), -1))))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_head_with_multiplier_and_softcap(softcap):
    made = sublayer(CASES["mlp: silu"])
    weight_VD, x_BD = torch.randn(75, 24), torch.randn(2, 24)
    wanted = made.norm(x_BD) @ weight_VD.T * 0.5
    wanted = wanted if softcap is None else softcap * torch.tanh(wanted / softcap)
    found = head.make_head()(made.norm, x_BD, weight_VD, multiplier=0.5, softcap=softcap)
    assert found.dtype == torch.float32 and difference(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_embedding(dtype):
    weight_VD = torch.randn(9, 1100, generator=torch.Generator().manual_seed(0)).half()
    tokens_BT = torch.tensor([[8, 1], [0, 2], [9, 3], [-1, 4]], dtype=dtype)
    x_BD = make_embed()(tokens_BT[:, 0], weight_VD, multiplier=3.0, dtype=torch.float32)
    assert torch.equal(x_BD[:2], weight_VD[[8, 0]].float() * 3) and x_BD[2:].isnan().all()
