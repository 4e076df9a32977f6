"""Our Triton convolution equals its torch definition: results, states and gradients, in Triton's interpreter."""

from __future__ import annotations

import interpreter
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stand_ins import conv_results

from mambadsl.kinds.conv import causal_conv, plain_conv
from mambadsl.parts.triton import conv

pytestmark = interpreter.ONLY

few = settings(max_examples=3, deadline=None)
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    # Small segments, of which a row has many: the interpreter would take minutes over a GPU's.
    monkeypatch.setattr(conv, "FORWARD", conv.Walk(32, 4, 4, 1, 12))
    monkeypatch.setattr(conv, "BACKWARD", conv.Walk(32, 4, 4, 1, 12))


def documents(batch, time, *, seed=0):
    """Numbers of packed documents, one of which comes twice in a row, and real lengths."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.rand(batch, time, generator=generator) < 0.2
    segments_BT = (step.cumsum(1) % 3).int()
    lengths_B = torch.randint(1, time + 1, (batch,), generator=generator)
    last_B1 = segments_BT.gather(1, lengths_B[:, None] - 1)
    padding_BT = torch.arange(time) >= lengths_B[:, None]
    return dict(segments_BT=torch.where(padding_BT, last_B1, segments_BT), lengths_B=lengths_B)


def case(batch=2, time=37, channels=20, K=4, *, before=3, after=2, bias=True, state=False):
    return (
        torch.randn(batch, time, before + channels + after), torch.randn(channels, K),
        torch.randn(channels) if bias else None, torch.randn(batch, channels, K - 1) if state else None,
    )


def same(inputs, *, mine=None, definition=causal_conv, before=3, **rows):
    both = mine or conv.make_conv(), definition
    found, truth = (conv_results(f, inputs, before=before, **rows) for f in both)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("K, bias, packed, state", [
    (2, True, True, True), (3, False, False, True), (4, True, False, False), (4, False, True, False),
    (5, False, True, True), (5, True, False, True),
])
def test_equals_the_definition(K, bias, packed, state):
    same(case(K=K, bias=bias, state=state), **(documents(2, 37) if packed else {}))


@pytest.mark.parametrize("K, bias, packed, state", [(3, False, True, True), (7, True, False, False)])
def test_without_silu(K, bias, packed, state):
    inputs, rows = case(K=K, bias=bias, state=state), documents(2, 37) if packed else {}
    same(inputs, mine=conv.make_plain_conv(), definition=plain_conv, **rows)
    whole = torch.compile(conv.make_plain_conv(), fullgraph=True, backend="aot_eager")
    same(inputs, mine=whole, definition=plain_conv, **rows)


@few
@given(
    batch=st.integers(1, 2), time=st.integers(1, 35), channels=st.integers(1, 40), K=st.integers(2, 8),
    before=st.integers(0, 5), packed=st.booleans(), state=st.booleans(), bias=st.booleans(),
    seed=st.integers(0, 99),
)
@example(batch=1, time=1, channels=1, K=8, before=0, packed=True, state=True, bias=True, seed=0)
@example(batch=3, time=16, channels=32, K=4, before=0, packed=False, state=True, bias=True, seed=0)
def test_any_shape(batch, time, channels, K, before, packed, state, bias, seed):
    inputs = case(batch, time, channels, K, before=before, bias=bias, state=state)
    same(inputs, before=before, **(documents(batch, time, seed=seed) if packed else {}))


@pytest.mark.parametrize("walk", [
    conv.Walk(32, 1, 1, 1, 3), conv.Walk(16, 4, 8, 1, 9, ahead=True), conv.FORWARD,
])
def test_every_walk_gives_the_same(walk, monkeypatch):
    monkeypatch.setattr(conv, "FORWARD", walk)
    monkeypatch.setattr(conv, "BACKWARD", walk)
    same(case(state=True, time=21, channels=18), **documents(2, 21, seed=3))


def test_gradients_go_straight_into_a_wider_buffer():
    x, weight, bias, _ = case(before=4, after=6)
    wide, dy = torch.full_like(x, 7.0), torch.randn(2, 37, 20)
    dx, flat, dstate = conv.backward(dy, x[..., 4:24], weight, bias, dx=wide[..., 4:24])
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y, _ = causal_conv(leaves[0][..., 4:24], *leaves[1:])
    dwide, dweight, dbias = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(wide[..., 4:24], dwide[..., 4:24], **CLOSE)
    torch.testing.assert_close(flat, torch.cat([dweight.flatten(), dbias]), **CLOSE)
    assert dx.data_ptr() == wide[..., 4:24].data_ptr() and dstate is None
    assert (wide[..., :4] == 7).all() and (wide[..., 24:] == 7).all()


def test_channels_that_are_not_innermost_are_copied():
    x, weight, bias, _ = case(before=0, after=0)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(conv.forward(turned, weight, bias), causal_conv(x, weight, bias)[0], **CLOSE)
    dx = torch.empty_like(turned)
    dy = torch.randn(1, 1, 20).expand(2, 37, 20)
    found = conv.backward(dy, turned, weight, bias, dx=dx)
    wanted = conv.backward(dy.contiguous(), x, weight, bias)
    assert found[0] is dx and torch.equal(dx, wanted[0]) and torch.equal(found[1], wanted[1])


def test_nothing_of_another_document_comes_through():
    x, weight, bias, _ = case(before=0, after=0)
    document_BT = torch.zeros(2, 37, dtype=torch.int32)
    document_BT[:, 20:] = 1
    x[:, 19] = float("nan")
    y = conv.forward(x, weight, bias, document_BT=document_BT)
    assert y[:, 20:].isfinite().all() and y[:, :19].isfinite().all() and y[:, 19].isnan().all()
    dx, _, _ = conv.backward(torch.ones_like(y), x, weight, bias, document_BT=document_BT)
    assert dx[:, 20:].isfinite().all() and dx[:, :16].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_tokens(shape):
    x, weight, bias = torch.randn(shape), torch.randn(8, 4), torch.randn(8)
    assert conv.forward(x, weight, bias).shape == shape
    dx, flat, dstate = conv.backward(x, x, weight, bias, state_BCJ=torch.ones(shape[0], 8, 3))
    assert dx.shape == shape and flat.shape == (40,) and (flat == 0).all() and (dstate == 0).all()


@pytest.mark.parametrize("state", [False, True])
def test_compiles_whole(state):
    whole = torch.compile(conv.make_conv(), fullgraph=True, backend="aot_eager")
    same(case(time=19, state=state), mine=whole, **(documents(2, 19) if state else {}))


@pytest.mark.parametrize("bias, state", [(True, False), (False, True)])
def test_the_ops_keep_their_promises(bias, state):
    x, weight, bias, state = case(time=19, bias=bias, state=state)
    leaves = [t if t is None else t.requires_grad_() for t in (x[..., 3:23], weight, bias, state)]
    document_BT = documents(2, 19)["segments_BT"]
    torch.library.opcheck(torch.ops.mambadsl.causal_conv.default, (*leaves[:3], document_BT, leaves[3], "triton"))


def test_keeps_the_dtype_of_x():
    x, weight, bias, _ = case(before=0, after=0)
    assert conv.forward(x.half(), weight, bias).dtype == torch.float16
    dx, flat, _ = conv.backward(x.half(), x.half(), weight, bias)
    assert dx.dtype == torch.float16 and flat.dtype == torch.float32


@given(
    batch=st.integers(1, 300), time=st.integers(1, 9000), channels=st.integers(1, 9000),
    processors=st.sampled_from([2, 20, 132]), K=st.sampled_from([2, 4, 8]),
    walk=st.sampled_from([conv.FORWARD, conv.BACKWARD, conv.Walk(512, 1, 8, 4, 3)]),
)
def test_segments_cover_the_rows(batch, time, channels, processors, K, walk):
    x = torch.empty(1).expand(batch, time, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_processors", lambda device: processors)
        laid = conv._lay(walk, x, K)
    blocks, programs = laid.grid
    assert blocks * laid.settings["BLOCK"] >= channels
    assert time <= laid.length * laid.segments < time + laid.length
    assert laid.length % laid.settings["ROWS"] == 0 and laid.length >= conv.MOST_TAPS
    assert (programs - 1) * laid.settings["LANES"] < batch * laid.segments <= programs * laid.settings["LANES"]
    enough = max(1, processors * walk.per_processor // blocks) * laid.settings["LANES"]
    assert batch * laid.segments <= max(enough, batch)


@pytest.mark.parametrize("K, words", [(1, "2 to 8 taps, not 1"), (9, "2 to 8 taps, not 9")])
def test_refuses_in_numbers(K, words):
    with pytest.raises(ValueError, match=words):
        conv.forward(torch.empty(1, 4, 16), torch.empty(16, K), None)
    with pytest.raises(ValueError, match=r"the state must be \[1, 16, 3\] .* not \[1, 16, 4\]"):
        conv.forward(torch.empty(1, 4, 16), torch.empty(16, 4), None, state_BCJ=torch.empty(1, 16, 4))
